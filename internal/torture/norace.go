//go:build !race

package main

import "time"

const rest time.Duration = 0
