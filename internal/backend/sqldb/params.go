package sqldb

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
)

// rewrite turns named parameters (:name) into numbered ones and returns their names in the order
// of their numbers. It knows what is not a parameter: strings, quoted names, comments, dollar
// quotes and casts (::type). Values never become part of the text.
func rewrite(sql string, postgres bool) (text string, names []string, err error) {
	var out strings.Builder
	number := map[string]int{}
	for i := 0; i < len(sql); {
		end, err := skip(sql, i, postgres)
		if err != nil {
			return "", nil, err
		}
		if end > i {
			out.WriteString(sql[i:end])
			i = end
			continue
		}
		switch c := sql[i]; {
		case c == ';':
			if strings.TrimSpace(stripComments(sql[i+1:], postgres)) != "" {
				return "", nil, errors.New("more than one statement; declare one tool for each")
			}
			return strings.TrimSpace(out.String()), names, nil
		case c == ':' && i+1 < len(sql) && sql[i+1] == ':':
			out.WriteString("::")
			i += 2
		case c == ':' && i+1 < len(sql) && isNameStart(sql[i+1]):
			j := i + 1
			for j < len(sql) && isName(sql[j]) {
				j++
			}
			name := sql[i+1 : j]
			if number[name] == 0 {
				names = append(names, name)
				number[name] = len(names)
			}
			if postgres {
				out.WriteByte('$')
			} else {
				out.WriteByte('?')
			}
			out.WriteString(strconv.Itoa(number[name]))
			i = j
		case c == '?' && !postgres, c == '$' && i+1 < len(sql) && sql[i+1] >= '0' && sql[i+1] <= '9', c == '@' && !postgres:
			return "", nil, fmt.Errorf("use named parameters such as :id, not %q", string(c))
		default:
			out.WriteByte(c)
			i++
		}
	}
	return strings.TrimSpace(out.String()), names, nil
}

// verbs are the first words of statements that are plain queries, and whether each writes. All
// else (transactions, settings, copies to files, ...) is no tool.
var verbs = map[string]struct{ writes, sqlite, postgres bool }{
	"SELECT":  {false, true, true},
	"WITH":    {false, true, true}, // what it writes, the plan tells
	"VALUES":  {false, true, true},
	"TABLE":   {false, false, true},
	"INSERT":  {true, true, true},
	"UPDATE":  {true, true, true},
	"DELETE":  {true, true, true},
	"REPLACE": {true, true, false},
	"MERGE":   {true, false, true},
}

// checkVerb refuses what is no plain query, and returns whether it writes by its first word.
func checkVerb(text string, postgres bool) (writes bool, err error) {
	rest := strings.TrimLeft(stripComments(text, postgres), " \t\r\n\f(")
	end := 0
	for end < len(rest) && isName(rest[end]) {
		end++
	}
	word := strings.ToUpper(rest[:end])
	v, ok := verbs[word]
	switch {
	case word == "":
		return false, errors.New("there is no statement")
	case !ok || postgres && !v.postgres || !postgres && !v.sqlite:
		return false, fmt.Errorf("%s cannot be a tool; a statement begins with SELECT, WITH, VALUES, INSERT, UPDATE or DELETE", word)
	}
	return v.writes, nil
}

func isNameStart(c byte) bool {
	return c == '_' || c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z'
}

func isName(c byte) bool { return isNameStart(c) || c >= '0' && c <= '9' }

// skip returns the end of what begins at i and holds no parameters, or i if nothing such begins.
func skip(sql string, i int, postgres bool) (int, error) {
	rest := sql[i:]
	switch {
	case rest[0] == '\'' || rest[0] == '"' || rest[0] == '`' && !postgres:
		escapes := postgres && rest[0] == '\'' && i > 0 && (sql[i-1] == 'E' || sql[i-1] == 'e') && (i == 1 || !isName(sql[i-2]))
		return quoted(sql, i, escapes)
	case strings.HasPrefix(rest, "--"):
		if n := strings.IndexByte(rest, '\n'); n >= 0 {
			return i + n, nil
		}
		return len(sql), nil
	case strings.HasPrefix(rest, "/*"):
		return comment(sql, i, postgres)
	case rest[0] == '[' && !postgres:
		if n := strings.IndexByte(rest, ']'); n >= 0 {
			return i + n + 1, nil
		}
	case rest[0] == '$' && postgres && (i == 0 || !isName(sql[i-1])):
		n := 1
		for n < len(rest) && isName(rest[n]) {
			n++
		}
		if n < len(rest) && rest[n] == '$' && (n == 1 || isNameStart(rest[1])) {
			tag := rest[:n+1]
			if m := strings.Index(rest[n+1:], tag); m >= 0 {
				return i + n + 1 + m + len(tag), nil
			}
			return 0, fmt.Errorf("the quote %s has no end", tag)
		}
	}
	return i, nil
}

func quoted(sql string, i int, escapes bool) (int, error) {
	q := sql[i]
	for j := i + 1; j < len(sql); j++ {
		switch {
		case escapes && sql[j] == '\\':
			j++
		case sql[j] == q && j+1 < len(sql) && sql[j+1] == q:
			j++
		case sql[j] == q:
			return j + 1, nil
		}
	}
	return 0, fmt.Errorf("the quote %c has no end", q)
}

// comment skips a comment; those of PostgreSQL nest.
func comment(sql string, i int, nests bool) (int, error) {
	depth := 0
	for j := i; j+1 < len(sql); j++ {
		switch {
		case sql[j] == '/' && sql[j+1] == '*' && (nests || depth == 0):
			depth++
			j++
		case sql[j] == '*' && sql[j+1] == '/':
			if depth--; depth == 0 {
				return j + 2, nil
			}
			j++
		}
	}
	return 0, errors.New("a comment has no end")
}

// stripComments removes comments, so that what is left after a statement can be seen.
func stripComments(sql string, postgres bool) string {
	var out strings.Builder
	for i := 0; i < len(sql); {
		if strings.HasPrefix(sql[i:], "--") || strings.HasPrefix(sql[i:], "/*") {
			if end, err := skip(sql, i, postgres); err == nil && end > i {
				i = end
				continue
			}
		}
		out.WriteByte(sql[i])
		i++
	}
	return out.String()
}
