package etcdutil

// closeExamples ends what the examples have started, if any ran. TestMain calls it.
var closeExamples = func() {}

// AtExit sets what TestMain calls after the tests. The examples are in a package of their own, which TestMain cannot
// reach.
func AtExit(f func()) { closeExamples = f }
