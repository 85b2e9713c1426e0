package etcdutil

// A LogOption shapes a log's writer or reader.
type LogOption interface{ applyLog(*logConfig) }

type logConfig struct {
	watchConfig
}

func (o codecOption) applyLog(c *logConfig) { c.codec = o.codec }
