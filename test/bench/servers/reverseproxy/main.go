// Command reverseproxy is httputil.ReverseProxy in front of a server, with connections to it kept
// open: what it costs to pass a call on without looking at it.
package main

import (
	"flag"
	"fmt"
	"net/http"
	"net/http/httputil"
	"net/url"
	"os"
)

func main() {
	addr := flag.String("addr", "127.0.0.1:8080", "address to serve on")
	upstream := flag.String("upstream", "", "URL of the server behind")
	flag.Parse()
	to, err := url.Parse(*upstream)
	if err == nil {
		to.Path = ""
		proxy := httputil.NewSingleHostReverseProxy(to)
		proxy.Transport = &http.Transport{MaxIdleConnsPerHost: 64, DisableCompression: true}
		err = http.ListenAndServe(*addr, proxy)
	}
	fmt.Fprintln(os.Stderr, "reverseproxy:", err)
	os.Exit(1)
}
