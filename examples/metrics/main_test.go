package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"flag"
	"io"
	"net/http"
	"os"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

func TestMetricsShowWhatAnOperatorAlertsOn(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	stdout, writer := io.Pipe()
	done := make(chan error, 1)
	go func() {
		done <- run(ctx, nil, writer)
		_ = writer.Close()
	}()
	url, err := bufio.NewReader(stdout).ReadString('\n')
	require.NoError(t, err)

	for _, line := range []string{
		`etcdutil_locks_held{name="scheduler"} 1`,
		`etcdutil_locks_waiting{name="scheduler"} 1`,
		`etcdutil_locks_waiting{name="job"} [1-4]`,
		`etcdutil_lock_acquire_seconds_count{name="job"} [1-9]`,
		`etcdutil_lock_held_seconds_count{name="job"} [1-9]`,
		`etcdutil_lock_releases_total{name="job"} [1-9]`,
		`etcdutil_lock_losses_total{cause="deleted",name="scheduler"} [1-9]`,
		`etcdutil_lock_losses_total{cause="expired",name="scheduler"} [1-9]`,
		`etcdutil_lease_renewal_seconds_count [1-9]`,
		`etcdutil_lease_left_seconds_count [1-9]`,
		`etcdutil_lease_expiry_seconds{lease="workers"} [0-9]`,
		`etcdutil_retries_total{op="[a-z ]+"} [1-9]`,
		`etcdutil_mirror_age_seconds{mirror="settings"} [0-9]`,
	} {
		pattern := regexp.MustCompile(line)
		require.Eventually(t, func() bool { return pattern.MatchString(get(t, strings.TrimSpace(url))) },
			time.Minute, 50*time.Millisecond, line)
	}
	cancel()
	require.NoError(t, <-done)
}

func get(t *testing.T, url string) string {
	resp, err := http.Get(url)
	if err != nil {
		return ""
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return ""
	}
	return string(body)
}

func TestDashboardQueriesMetricsThatExist(t *testing.T) {
	t.Parallel()
	data, err := os.ReadFile("dashboard.json")
	require.NoError(t, err)
	var dashboard struct {
		Panels []struct {
			Title, Description string
			Targets            []struct{ Expr string }
		}
	}
	require.NoError(t, json.Unmarshal(data, &dashboard))
	source, err := os.ReadFile("etcdmetrics/etcdmetrics.go")
	require.NoError(t, err)
	shown := map[string]bool{}
	for _, panel := range dashboard.Panels {
		require.NotEmpty(t, panel.Description, panel.Title)
		require.NotEmpty(t, panel.Targets, panel.Title)
		for _, target := range panel.Targets {
			for _, name := range regexp.MustCompile(`etcdutil_\w+`).FindAllString(target.Expr, -1) {
				shown[strings.TrimSuffix(name, "_bucket")] = true
			}
		}
	}
	for _, match := range regexp.MustCompile(`Name: "(\w+)"`).FindAllStringSubmatch(string(source), -1) {
		require.True(t, shown[match[1]], "%s is on no panel", match[1])
		delete(shown, match[1])
	}
	require.Empty(t, shown, "these do not exist")
}

func TestMetricsHelpServesNothing(t *testing.T) {
	t.Parallel()
	var out bytes.Buffer
	require.ErrorIs(t, run(t.Context(), []string{"-h"}, &out), flag.ErrHelp)
	require.Contains(t, out.String(), "-listen")
	require.NotContains(t, out.String(), "http://")
}
