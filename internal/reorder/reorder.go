// Package reorder changes the order of etcd's answers as etcd itself may.
package reorder

import (
	"context"
	"strings"
	"sync/atomic"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc"
)

// Progress holds back answers about the progress of watches until the next watch of the stream was
// created, or until the next answer about progress. etcd sends the two by ways of their own, so
// that an answer from before the creation may come after it. The zero Progress is ready.
type Progress struct{ held atomic.Int64 }

// Held returns how many answers were held back so far.
func (p *Progress) Held() int64 { return p.held.Load() }

// Intercept is a grpc.StreamClientInterceptor.
func (p *Progress) Intercept(
	ctx context.Context, desc *grpc.StreamDesc, conn *grpc.ClientConn, method string, streamer grpc.Streamer, opts ...grpc.CallOption,
) (grpc.ClientStream, error) {
	stream, err := streamer(ctx, desc, conn, method, opts...)
	if err != nil || !strings.HasSuffix(method, "etcdserverpb.Watch/Watch") {
		return stream, err
	}
	return &watchStream{ClientStream: stream, progress: p}, nil
}

// watchStream is used by one sender and one receiver.
type watchStream struct {
	grpc.ClientStream
	progress *Progress
	sent     atomic.Int64      // requests for a watch
	created  int64             // answers to them
	held     *pb.WatchResponse // an answer about progress
	heldAt   int64             // how many watches had been requested when it came
	next     *pb.WatchResponse // what comes next
}

func (s *watchStream) SendMsg(m any) error {
	if m.(*pb.WatchRequest).GetCreateRequest() != nil {
		s.sent.Add(1)
	}
	return s.ClientStream.SendMsg(m)
}

func (s *watchStream) RecvMsg(m any) error {
	resp := s.next
	s.next = nil
	for resp == nil {
		received := new(pb.WatchResponse)
		if err := s.ClientStream.RecvMsg(received); err != nil {
			return err
		}
		resp = s.reorder(received)
	}
	set(m.(*pb.WatchResponse), resp)
	return nil
}

// reorder returns what comes now, nil if that is held back. Progress comes after the creation only
// of a watch that was requested after the answer had come: what is made after a creation may be
// sent before it, but never between the creation and the watch's first events.
func (s *watchStream) reorder(resp *pb.WatchResponse) *pb.WatchResponse {
	switch {
	case isProgress(resp):
		s.progress.held.Add(1)
		resp, s.held = s.held, resp
		s.heldAt = s.sent.Load()
	case resp.Created:
		s.created++
		if s.held != nil && s.created <= s.heldAt {
			resp, s.held = s.held, resp
		}
		s.next, s.held = s.held, nil
	}
	return resp
}

func isProgress(resp *pb.WatchResponse) bool {
	return !resp.Created && !resp.Canceled && resp.CompactRevision == 0 && len(resp.Events) == 0
}

// set copies all fields.
func set(to, from *pb.WatchResponse) {
	to.Header, to.WatchId, to.Created, to.Canceled = from.Header, from.WatchId, from.Created, from.Canceled
	to.CompactRevision, to.CancelReason, to.Fragment, to.Events = from.CompactRevision, from.CancelReason, from.Fragment, from.Events
}
