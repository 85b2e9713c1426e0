package etcdutil_test

import (
	"os"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestTheProgramInTheReadmeIsTheOneThatIsCompiled(t *testing.T) {
	readme, err := os.ReadFile("README.md")
	require.NoError(t, err)
	compiled, err := os.ReadFile("examples/readme/main.go")
	require.NoError(t, err)

	_, program, found := strings.Cut(string(readme), "```go\npackage main\n")
	require.True(t, found, "README.md has no Go program")
	program, _, found = strings.Cut(program, "```\n")
	require.True(t, found, "the program in README.md does not end")
	require.Equal(t, string(compiled), "package main\n"+program)
}
