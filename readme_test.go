package etcdutil_test

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"unicode"

	"github.com/stretchr/testify/require"
)

// pages returns the project's Markdown files.
func pages(t *testing.T) map[string]string {
	t.Helper()
	pages := make(map[string]string)
	for _, pattern := range []string{"*.md", "docs/*.md", "examples/*/*.md"} {
		paths, err := filepath.Glob(pattern)
		require.NoError(t, err)
		for _, path := range paths {
			text, err := os.ReadFile(path)
			require.NoError(t, err)
			pages[path] = string(text)
		}
	}
	require.Contains(t, pages, "README.md")
	return pages
}

// blocks returns a page's fenced blocks of a language.
func blocks(page, language string) []string {
	var blocks []string
	for _, m := range regexp.MustCompile("(?ms)^```"+language+"\n(.*?)^```$").FindAllStringSubmatch(page, -1) {
		blocks = append(blocks, m[1])
	}
	return blocks
}

func TestDocsGoBlocksAreCompiled(t *testing.T) {
	compiled := ""
	paths, err := filepath.Glob("examples/readme/*.go")
	require.NoError(t, err)
	for _, path := range paths {
		source, err := os.ReadFile(path)
		require.NoError(t, err)
		compiled += "\n" + unindented(string(source))
	}
	for path, page := range pages(t) {
		for _, block := range blocks(page, "go") {
			require.Contains(t, compiled, "\n"+unindented(block), "%s: this block is not in examples/readme:\n%s", path, block)
		}
	}
	require.NotEmpty(t, blocks(pages(t)["README.md"], "go"))
}

// unindented makes a block that stands inside a function equal to the same block at the margin.
func unindented(source string) string {
	lines := strings.Split(source, "\n")
	for i, line := range lines {
		lines[i] = strings.TrimLeft(line, "\t")
	}
	return strings.Join(lines, "\n")
}

func TestDocsCommandsWork(t *testing.T) {
	t.Parallel()
	for path, page := range pages(t) {
		for _, block := range blocks(page, "sh") {
			for line := range strings.Lines(block) {
				command, _, _ := strings.Cut(line, "#")
				checkCommand(t, path, strings.Fields(command))
			}
		}
	}
	commands := strings.Join(blocks(pages(t)["README.md"], "sh"), "")
	require.Contains(t, commands, "go test ./...\n")
	require.Contains(t, commands, "go run ./examples/failover\n")
	// After the first command alone, a test that uses etcdtest does not build.
	require.Contains(t, commands, "go get example.com/etcdutil\n")
	require.Contains(t, commands, "go get example.com/etcdutil/etcdtest ")
}

func checkCommand(t *testing.T, page string, words []string) {
	t.Helper()
	switch {
	case len(words) == 0:
	case words[0] == "go":
		checkGoCommand(t, page, words[1:])
	case strings.HasPrefix(words[0], "."):
		info, err := os.Stat(words[0])
		require.NoError(t, err, page)
		require.NotZero(t, info.Mode()&0o111, "%s: %s is not executable", page, words[0])
	}
}

// checkGoCommand fails the test if a go command names a package or a flag that does not exist, or
// runs a program that does not compile.
func checkGoCommand(t *testing.T, page string, args []string) {
	t.Helper()
	command := page + ": go " + strings.Join(args, " ")
	switch args[0] {
	case "get":
		for _, arg := range args[1:] {
			dir := "." + strings.TrimPrefix(arg, "example.com/etcdutil")
			require.True(t, exported(t, dir)[""], "%s: %s is no package", command, arg)
		}
	case "test", "vet", "build":
		for _, arg := range args[1:] {
			if strings.HasPrefix(arg, ".") {
				require.NoError(t, exec.Command("go", "list", arg).Run(), command)
			}
		}
	case "run":
		target := args[1]
		out, err := exec.Command("go", "list", "-export", "-f", "{{.Name}}", target).CombinedOutput()
		require.NoError(t, err, "%s: %s", command, out)
		require.Equal(t, "main\n", string(out), command)
		requireFlags(t, command, target, args[2:])
	default:
		require.Fail(t, "no check for this command", command)
	}
}

func requireFlags(t *testing.T, command, target string, args []string) {
	t.Helper()
	source := ""
	paths, err := filepath.Glob(filepath.Join(target, "*.go"))
	require.NoError(t, err)
	for _, path := range paths {
		text, err := os.ReadFile(path)
		require.NoError(t, err)
		source += string(text)
	}
	for _, arg := range args {
		if name, isFlag := strings.CutPrefix(arg, "-"); isFlag {
			require.Contains(t, source, fmt.Sprintf("(%q, ", name), command)
		}
	}
}

var link = regexp.MustCompile(`\]\(([^)\s]+)\)|(?:src|srcset)="([^"]+)"`)

func TestDocsLinksLeadSomewhere(t *testing.T) {
	pages := pages(t)
	for path, page := range pages {
		for _, m := range link.FindAllStringSubmatch(page, -1) {
			target := m[1] + m[2]
			file, anchor, _ := strings.Cut(target, "#")
			switch {
			case strings.HasPrefix(target, "https://pkg.go.dev/example.com/etcdutil"):
				dir := "." + strings.TrimPrefix(file, "https://pkg.go.dev/example.com/etcdutil")
				require.True(t, exported(t, dir)[anchor], "%s: %s is not in godoc", path, target)
				continue
			case strings.Contains(target, "://"):
				continue
			}
			if file != "" {
				file = filepath.Join(filepath.Dir(path), file)
				_, err := os.Stat(file)
				require.NoError(t, err, "%s: %s", path, target)
			} else {
				file = path
			}
			if anchor != "" {
				require.True(t, anchors(pages[file])[anchor], "%s: %s is no heading", path, target)
			}
		}
	}
}

// exported returns the anchors that godoc gives a package's identifiers, and "".
func exported(t *testing.T, dir string) map[string]bool {
	t.Helper()
	names := map[string]bool{"": true}
	paths, err := filepath.Glob(filepath.Join(dir, "*.go"))
	require.NoError(t, err)
	require.NotEmpty(t, paths, dir)
	for _, path := range paths {
		if strings.HasSuffix(path, "_test.go") {
			continue
		}
		file, err := parser.ParseFile(token.NewFileSet(), path, nil, 0)
		require.NoError(t, err)
		for _, decl := range file.Decls {
			switch d := decl.(type) {
			case *ast.FuncDecl:
				names[receiver(d)+d.Name.Name] = true
			case *ast.GenDecl:
				for _, spec := range d.Specs {
					switch s := spec.(type) {
					case *ast.TypeSpec:
						names[s.Name.Name] = true
					case *ast.ValueSpec:
						for _, name := range s.Names {
							names[name.Name] = true
						}
					}
				}
			}
		}
	}
	return names
}

// receiver returns "Type." for a method, else "".
func receiver(f *ast.FuncDecl) string {
	if f.Recv == nil {
		return ""
	}
	expr := f.Recv.List[0].Type
	for {
		switch e := expr.(type) {
		case *ast.StarExpr:
			expr = e.X
		case *ast.IndexExpr:
			expr = e.X
		case *ast.Ident:
			return e.Name + "."
		default:
			return ""
		}
	}
}

// anchors returns the anchors that GitHub gives a page's headings.
func anchors(page string) map[string]bool {
	anchors := make(map[string]bool)
	for _, m := range regexp.MustCompile(`(?m)^#+ (.*)$`).FindAllStringSubmatch(page, -1) {
		anchor := strings.Map(func(r rune) rune {
			switch {
			case r == ' ':
				return '-'
			case unicode.IsLetter(r), unicode.IsDigit(r), r == '-', r == '_':
				return unicode.ToLower(r)
			}
			return -1
		}, m[1])
		anchors[anchor] = true
	}
	return anchors
}

func TestDocsTableOfOptionsNamesEveryOption(t *testing.T) {
	doc, err := exec.Command("go", "doc", ".").Output()
	require.NoError(t, err)
	table, _, found := strings.Cut(string(doc), "# Shutting down")
	require.True(t, found)
	for name := range exported(t, ".") {
		if strings.HasPrefix(name, "With") {
			require.Regexp(t, `\n    `+name+` +x?`, table)
		}
	}
}

// The two pictures differ in their colors only.
func TestDocsPicturesShowTheSameInLightAndDark(t *testing.T) {
	color := regexp.MustCompile(`#[0-9a-f]{6}`)
	light, err := os.ReadFile("docs/lock-life.svg")
	require.NoError(t, err)
	dark, err := os.ReadFile("docs/lock-life-dark.svg")
	require.NoError(t, err)
	require.NotEqual(t, light, dark)
	require.Equal(t, color.ReplaceAllString(string(light), ""), color.ReplaceAllString(string(dark), ""))
}
