package etcdutil

import (
	"encoding/json"
	"fmt"
)

// A Codec turns values into bytes and back. Both methods must be safe for concurrent use, and must not keep data.
type Codec interface {
	Marshal(v any) ([]byte, error)
	// Unmarshal decodes data into v, a pointer to a zero value.
	Unmarshal(data []byte, v any) error
}

var (
	// JSON is encoding/json. It is the default.
	JSON Codec = jsonCodec{}
	// Raw takes string and []byte, and leaves them as they are.
	Raw Codec = rawCodec{}
)

type jsonCodec struct{}

func (jsonCodec) Marshal(v any) ([]byte, error)      { return json.Marshal(v) }
func (jsonCodec) Unmarshal(data []byte, v any) error { return json.Unmarshal(data, v) }

type rawCodec struct{}

func (rawCodec) Marshal(v any) ([]byte, error) {
	switch v := v.(type) {
	case string:
		return []byte(v), nil
	case []byte:
		return v, nil
	}
	return nil, fmt.Errorf("etcdutil: Raw takes string and []byte, not %T", v)
}

func (rawCodec) Unmarshal(data []byte, v any) error {
	switch v := v.(type) {
	case *string:
		*v = string(data)
	case *[]byte:
		*v = append([]byte{}, data...)
	default:
		return fmt.Errorf("etcdutil: Raw gives *string and *[]byte, not %T", v)
	}
	return nil
}

type codecOption struct{ codec Codec }

func (o codecOption) applyWatch(c *watchConfig)       { c.codec = o.codec }
func (o codecOption) applyRegister(c *registerConfig) { c.codec = o.codec }

// WithCodec sets how values are decoded and encoded; default [JSON]. nil is refused.
func WithCodec(c Codec) CodecOption { return codecOption{c} }

// decode returns the zero value with an error, which is ErrInvalidValue and wraps the codec's. A codec that panics returns an
// error, too.
func decode[T any](codec Codec, data []byte) (v T, err error) {
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("%w: the codec panicked: %v", ErrInvalidValue, r)
		}
		if err != nil {
			v = *new(T)
		}
	}()
	if err := codec.Unmarshal(data, &v); err != nil {
		return v, fmt.Errorf("%w: %w", ErrInvalidValue, err)
	}
	return v, nil
}
