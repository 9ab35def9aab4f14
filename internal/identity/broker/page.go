package broker

import (
	"html/template"
	"net/http"

	"newel.dev/newel/internal/identity/issuer"
)

const style = `<style>body{font:16px/1.5 system-ui,sans-serif;max-width:34rem;margin:3rem auto;padding:0 1rem}button{font:inherit;padding:.4rem 1rem;margin:.2rem .4rem .2rem 0}
.note{color:#555}</style>`

var ask = template.Must(template.New("consent").Parse(`<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>Allow access?</title>
` + style + `</head><body>
<h1>Allow access?</h1>
<p><strong>{{.Client}}</strong> asks to use <strong>{{.Resource}}</strong> in your name{{if .Name}}, {{.Name}}{{end}}.</p>
{{if .Scopes}}<p>It could use:</p>
<ul>{{range .Scopes}}<li><code>{{.}}</code></li>{{end}}</ul>{{end}}
<p>You will be sent to <strong>{{.Host}}</strong>.{{if .Local}} That is a program on your own computer: go on only if you have just started it yourself.{{end}}</p>
<form method="post" action="/oauth/consent"><input type="hidden" name="token" value="{{.Token}}">
<button name="answer" value="allow">Allow</button><button name="answer" value="deny">Do not allow</button></form>
<p class="note">The name is what the app says of itself. If you did not start this, do not allow it.</p>
</body></html>
`))

var problem = template.Must(template.New("problem").Parse(`<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>Log in</title>
` + style + `</head><body><h1>Not logged in</h1><p>{{.}}</p></body></html>
`))

// show asks whether a client may act in the name of who has logged in.
func show(w http.ResponseWriter, l *login) {
	issuer.Page(w)
	_ = ask.Execute(w, map[string]any{ // if it fails the browser is gone
		"Client": l.Ask.ClientName, "Resource": l.Ask.Resource, "Scopes": l.Person.Allowed(l.Ask.Scopes), "Host": issuer.HostOf(l.Ask.Redirect),
		"Name": l.Name, "Token": l.State, "Local": !lasts(l.Ask),
	})
}

// fail tells a person what is wrong.
func fail(w http.ResponseWriter, status int, text string) {
	issuer.Page(w)
	w.WriteHeader(status)
	_ = problem.Execute(w, text) // if it fails the browser is gone
}
