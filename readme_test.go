package etcdutil_test

import (
	"context"
	"errors"
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
	"time"
	"unicode"

	"example.com/etcdutil"
	"example.com/etcdutil/etcdtest"
	"github.com/stretchr/testify/require"
	clientv3 "go.etcd.io/etcd/client/v3"
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
	for len(words) > 0 && strings.Contains(words[0], "=") { // VARIABLE=value
		words = words[1:]
	}
	switch {
	case len(words) == 0:
	case words[0] == "go":
		checkGoCommand(t, page, words[1:])
	case words[0] == "etcdctl": // TestPermissions runs those of docs/behavior.md
	case strings.Contains(words[0], "/"):
		info, err := os.Stat(words[0])
		require.NoError(t, err, page)
		require.NotZero(t, info.Mode()&0o111, "%s: %s is not executable", page, words[0])
	default:
		require.Fail(t, "no check for this command", "%s: %s", page, strings.Join(words, " "))
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

func TestDocsTableOfOptionsShowsWhatEachConstructorAccepts(t *testing.T) {
	t.Parallel()
	doc, err := exec.Command("go", "doc", ".").Output()
	require.NoError(t, err)
	header := regexp.MustCompile(`(?m)^ +Lease +Lock +Writer .*$`).FindString(string(doc))
	require.NotEmpty(t, header)
	given := givenOptions(t)
	for name := range exported(t, ".") {
		if !strings.HasPrefix(name, "With") {
			continue
		}
		require.Contains(t, given, name)
		row := regexp.MustCompile(`(?m)^    ` + name + ` .*$`).FindString(string(doc))
		for _, column := range regexp.MustCompile(`\w+`).FindAllStringIndex(header, -1) {
			constructor := header[column[0]:column[1]]
			marked := len(row) > column[0] && strings.Contains(row[column[0]:min(column[1], len(row))], "x")
			if name == "WithSnapshot" && (constructor == "Mirror" || constructor == "Holder") {
				require.False(t, marked) // accepted, without effect
				continue
			}
			require.Equal(t, given[name][constructor], marked, "%s in the column of %s", name, constructor)
		}
	}
}

// givenOptions returns, for each option, which constructors accept it.
func givenOptions(t *testing.T) map[string]map[string]bool {
	t.Helper()
	client := etcdtest.Start(t, 1).Client(t)
	lock, err := etcdutil.Acquire(t.Context(), client, "lock")
	require.NoError(t, err)
	accepted := make(map[string]map[string]bool)
	for name, option := range map[string]any{
		"WithLogger":            etcdutil.WithLogger(nil),
		"WithObserver":          etcdutil.WithObserver(etcdutil.Observer{}),
		"WithRetryPolicy":       etcdutil.WithRetryPolicy(etcdutil.RetryPolicy{}),
		"WithKeepAliveInterval": etcdutil.WithKeepAliveInterval(time.Second),
		"WithExpiryMargin":      etcdutil.WithExpiryMargin(time.Second),
		"WithMaxKeepAlives":     etcdutil.WithMaxKeepAlives(1),
		"WithTTL":               etcdutil.WithTTL(time.Minute),
		"WithLease":             etcdutil.WithLease(lock.Lease()),
		"WithValue":             etcdutil.WithValue("v"),
		"WithAcquireTimeout":    etcdutil.WithAcquireTimeout(time.Minute),
		"WithCodec":             etcdutil.WithCodec(etcdutil.JSON),
		"WithEveryEntry":        etcdutil.WithEveryEntry(0),
		"WithEntriesAfter":      etcdutil.WithEntriesAfter(1, 1),
		"WithPrefix":            etcdutil.WithPrefix(),
		"WithPrev":              etcdutil.WithPrev(),
		"WithRevision":          etcdutil.WithRevision(1),
		"WithSnapshot":          etcdutil.WithSnapshot(),
	} {
		accepted[name] = acceptedBy(t, client, lock, option)
	}
	return accepted
}

// acceptedBy returns which constructors an option fits and is not refused by. Each gets a context
// that has ended, and returns its end if the arguments are right.
func acceptedBy(t *testing.T, client *clientv3.Client, lock *etcdutil.Lock, option any) map[string]bool {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	errs := make(map[string]error)
	if o, ok := option.(etcdutil.LeaseOption); ok {
		_, errs["Lease"] = etcdutil.NewLease(ctx, client, time.Minute, o)
	}
	if o, ok := option.(etcdutil.LockOption); ok {
		_, errs["Lock"] = etcdutil.Acquire(ctx, client, "other", o)
	}
	if o, ok := option.(etcdutil.LogOption); ok {
		_, errs["Writer"] = etcdutil.NewLogWriter[string](ctx, lock, "log", o)
		_, errs["Reader"] = etcdutil.NewLogReader[string](ctx, client, "log", o)
	}
	if o, ok := option.(etcdutil.WatchOption); ok {
		_, errs["Watch"] = etcdutil.Watch[string](ctx, client, "key", o)
		_, errs["Holder"] = etcdutil.WatchHolder(ctx, client, "other", o)
		_, errs["Mirror"] = etcdutil.NewMirror[string](ctx, client, "key", o)
	}
	if o, ok := option.(etcdutil.RegisterOption); ok {
		_, errs["Register"] = etcdutil.Register(ctx, client, "key", "v", o)
	}
	if o, ok := option.(etcdutil.RetryOption); ok {
		_, errs["Retry"] = etcdutil.Holder(ctx, client, "other", o)
	}
	accepted := make(map[string]bool)
	for constructor, err := range errs {
		accepted[constructor] = errors.Is(err, context.Canceled)
	}
	return accepted
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
