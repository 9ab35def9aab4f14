package knowledge

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"path"
	"strings"
	"unicode/utf8"

	"github.com/ledongthuc/pdf"
	"golang.org/x/net/html"
	"golang.org/x/net/html/atom"
	"golang.org/x/text/encoding/charmap"
)

// document is what a file says.
type document struct {
	title, text string
}

// format is a kind of file.
type format struct {
	mime    string
	extract func(data []byte) (document, error)
}

// formatOf returns the format of a file by its name, or nil if it is none of ours.
func formatOf(p string) *format {
	switch strings.ToLower(path.Ext(p)) {
	case ".md", ".markdown":
		return &format{"text/markdown", markdown}
	case ".txt", ".text":
		return &format{"text/plain", plain}
	case ".html", ".htm":
		return &format{"text/html", fromHTML}
	case ".pdf":
		return &format{"application/pdf", fromPDF}
	}
	return nil
}

// toUTF8 reads text that is not UTF-8 as Windows-1252, the most common other encoding.
func toUTF8(data []byte) string {
	data = bytes.TrimPrefix(data, []byte("\xef\xbb\xbf"))
	if utf8.Valid(data) {
		return strings.ReplaceAll(string(data), "\x00", "")
	}
	out, err := charmap.Windows1252.NewDecoder().Bytes(data)
	if err != nil {
		return strings.ToValidUTF8(string(data), "\uFFFD")
	}
	return strings.ReplaceAll(string(out), "\x00", "")
}

func plain(data []byte) (document, error) { return document{text: toUTF8(data)}, nil }

// markdown takes the title from the front matter or the first heading.
func markdown(data []byte) (document, error) {
	d := document{text: toUTF8(data)}
	body := d.text
	if rest, ok := strings.CutPrefix(body, "---\n"); ok {
		if front, after, ok := strings.Cut(rest, "\n---"); ok {
			for line := range strings.Lines(front) {
				if v, ok := strings.CutPrefix(line, "title:"); ok {
					d.title = strings.Trim(strings.TrimSpace(v), `"'`)
				}
			}
			body = after
		}
	}
	if d.title == "" {
		for line := range strings.Lines(body) {
			if v, ok := strings.CutPrefix(line, "# "); ok {
				d.title = strings.TrimSpace(v)
				break
			}
		}
	}
	return d, nil
}

// blocks are elements whose text stands on lines of its own.
var blocks = map[atom.Atom]bool{atom.P: true, atom.Div: true, atom.Li: true, atom.Tr: true, atom.Br: true, atom.H1: true, atom.H2: true, atom.H3: true, atom.H4: true, atom.H5: true, atom.H6: true, atom.Section: true, atom.Article: true, atom.Pre: true, atom.Blockquote: true, atom.Td: true, atom.Th: true}

// fromHTML keeps what a reader would see.
func fromHTML(data []byte) (document, error) {
	var d document
	var out strings.Builder
	z := html.NewTokenizer(strings.NewReader(toUTF8(data)))
	z.SetMaxBuf(1 << 20)
	hidden, inTitle := 0, false
	for {
		kind := z.Next()
		switch kind {
		case html.ErrorToken:
			if err := z.Err(); !errors.Is(err, io.EOF) {
				return d, err
			}
			d.title = strings.Join(strings.Fields(d.title), " ")
			d.text = tidy(out.String())
			return d, nil
		case html.TextToken:
			if inTitle {
				d.title += z.Token().Data
			} else if hidden == 0 {
				out.WriteString(z.Token().Data)
			}
		case html.StartTagToken, html.EndTagToken, html.SelfClosingTagToken:
			name, _ := z.TagName()
			tag := atom.Lookup(name)
			if blocks[tag] {
				out.WriteByte('\n')
			}
			step := map[html.TokenType]int{html.StartTagToken: 1, html.EndTagToken: -1}[kind]
			switch tag {
			case atom.Script, atom.Style, atom.Noscript, atom.Template:
				hidden = max(0, hidden+step)
			case atom.Title:
				inTitle = step > 0 && d.title == ""
			}
		}
	}
}

// tidy folds white space within lines and drops empty lines in a row.
func tidy(s string) string {
	var out []string
	for line := range strings.Lines(s) {
		line = strings.Join(strings.Fields(line), " ")
		if line != "" || len(out) > 0 && out[len(out)-1] != "" {
			out = append(out, line)
		}
	}
	return strings.TrimSpace(strings.Join(out, "\n"))
}

const maxPages = 5000

// fromPDF takes the text of every page. The library panics on broken files: that is an error here.
func fromPDF(data []byte) (d document, err error) {
	defer func() {
		if v := recover(); v != nil {
			err = fmt.Errorf("not a readable PDF: %v", v)
		}
	}()
	r, err := pdf.NewReader(bytes.NewReader(data), int64(len(data)))
	if err != nil {
		return d, fmt.Errorf("not a readable PDF: %w", err)
	}
	if r.NumPage() > maxPages {
		return d, fmt.Errorf("%d pages, over the limit of %d", r.NumPage(), maxPages)
	}
	d.title = r.Trailer().Key("Info").Key("Title").Text()
	var out strings.Builder
	fonts := map[string]*pdf.Font{}
	for i := 1; i <= r.NumPage(); i++ {
		p := r.Page(i)
		if p.V.IsNull() {
			continue
		}
		for _, name := range p.Fonts() {
			if _, ok := fonts[name]; !ok {
				f := p.Font(name)
				fonts[name] = &f
			}
		}
		text, err := p.GetPlainText(fonts)
		if err != nil {
			return d, fmt.Errorf("page %d: %w", i, err)
		}
		out.WriteString(text)
		out.WriteByte('\n')
	}
	d.text = strings.ToValidUTF8(strings.ReplaceAll(out.String(), "\x00", ""), "\uFFFD")
	return d, nil
}
