package etcdutil_test

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// goFiles returns the paths of the repository's Go files.
func goFiles(t *testing.T) []string {
	t.Helper()
	var paths []string
	err := filepath.WalkDir(".", func(path string, d fs.DirEntry, err error) error {
		if err == nil && strings.HasSuffix(path, ".go") {
			paths = append(paths, path)
		}
		return err
	})
	require.NoError(t, err)
	require.Contains(t, paths, "etcdutil.go")
	return paths
}

// unwanted are words that comments and pages avoid: code returns, reports and reads.
var unwanted = regexp.MustCompile(`(?i)\bsave where\b|\b(is|was|were|be|been) told\b|\btells\b|\bforgets\b`)

func TestProseAvoidsUnwantedWords(t *testing.T) {
	var found []string
	for path, page := range pages(t) {
		if path == "CONTRIBUTING.md" {
			continue // it names them
		}
		for _, m := range unwanted.FindAllString(page, -1) {
			found = append(found, path+": "+m)
		}
	}
	for _, path := range goFiles(t) {
		file, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.ParseComments)
		require.NoError(t, err)
		for _, group := range file.Comments {
			for _, m := range unwanted.FindAllString(strings.Join(strings.Fields(group.Text()), " "), -1) {
				found = append(found, path+": "+m)
			}
		}
	}
	require.Empty(t, found, strings.Join(found, "\n"))
}

// The doc comment of an exported identifier begins with its name.
func TestProseDocCommentsNameWhatTheyDescribe(t *testing.T) {
	var bare []string
	for _, dir := range []string{".", "etcdtest"} {
		paths, err := filepath.Glob(filepath.Join(dir, "*.go"))
		require.NoError(t, err)
		for _, path := range paths {
			if strings.HasSuffix(path, "_test.go") {
				continue
			}
			file, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.ParseComments)
			require.NoError(t, err)
			for _, d := range exportedDocs(file) {
				first := regexp.MustCompile(`^(A |An )?` + d.name + `\b`)
				if !first.MatchString(d.doc.Text()) {
					bare = append(bare, path+": "+d.name)
				}
			}
		}
	}
	require.Empty(t, bare, strings.Join(bare, "\n"))
}

type documentedName struct {
	name string
	doc  *ast.CommentGroup
}

// exportedDocs returns the exported identifiers of a file with their doc comments. Constants and
// variables may have the comment of their group. String needs none.
func exportedDocs(file *ast.File) []documentedName {
	var docs []documentedName
	add := func(name *ast.Ident, candidates ...*ast.CommentGroup) {
		if name.IsExported() && name.Name != "String" {
			docs = append(docs, documentedName{name.Name, firstDoc(candidates...)})
		}
	}
	for _, decl := range file.Decls {
		switch d := decl.(type) {
		case *ast.FuncDecl:
			if d.Recv == nil || ast.IsExported(receiver(d)) {
				add(d.Name, d.Doc)
			}
		case *ast.GenDecl:
			for _, spec := range d.Specs {
				switch s := spec.(type) {
				case *ast.TypeSpec:
					add(s.Name, s.Doc, d.Doc)
				case *ast.ValueSpec:
					add(s.Names[0], s.Doc, d.Doc)
				}
			}
		}
	}
	return docs
}

func firstDoc(docs ...*ast.CommentGroup) *ast.CommentGroup {
	for _, doc := range docs {
		if doc != nil {
			return doc
		}
	}
	return nil
}
