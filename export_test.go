package etcdutil

// closeExamples stops what the examples have started. TestMain calls it.
var closeExamples = func() {}

// AtExit sets the function that TestMain calls after the tests. The examples need it, because
// they are in another package.
func AtExit(f func()) { closeExamples = f }
