package etcdutil

import (
	"encoding/json"
	"fmt"
)

// A Codec turns values into bytes and back. Both methods must be safe for concurrent use. If a
// codec panics, that counts as its error.
type Codec interface {
	// Marshal encodes v. The package does not change its result.
	Marshal(v any) ([]byte, error)
	// Unmarshal decodes data into v, a pointer to a zero value. It must not keep or change data.
	Unmarshal(data []byte, v any) error
}

var (
	// JSON is encoding/json. It is the default.
	JSON Codec = jsonCodec{}
	// Raw stores string and []byte as they are, and refuses other types. A nil []byte is stored as
	// an empty value.
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
	return nil, fmt.Errorf("the Raw codec takes string and []byte, not %T", v)
}

func (rawCodec) Unmarshal(data []byte, v any) error {
	switch v := v.(type) {
	case *string:
		*v = string(data)
	case *[]byte:
		*v = append([]byte{}, data...)
	default:
		return fmt.Errorf("the Raw codec decodes into string and []byte, not %T", v)
	}
	return nil
}

type codecOption struct{ codec Codec }

func (o codecOption) applyWatch(c *watchConfig)       { c.codec = o.codec }
func (o codecOption) applyRegister(c *registerConfig) { c.codec = o.codec }

// WithCodec sets how values are encoded and decoded. The default is [JSON]. nil is refused.
func WithCodec(c Codec) CodecOption { return codecOption{c} }

// decode returns a value, or the zero value with ErrInvalidValue, which wraps the codec's error. A
// codec that panics is an error as well.
func decode[T any](codec Codec, data []byte) (v T, err error) {
	defer func() {
		if r := recover(); r != nil {
			err = errorf("%w: the codec panicked: %v", ErrInvalidValue, r)
		}
		if err != nil {
			v = *new(T)
		}
	}()
	if err := codec.Unmarshal(data, &v); err != nil {
		return v, errorf("%w: %w", ErrInvalidValue, err)
	}
	return v, nil
}
