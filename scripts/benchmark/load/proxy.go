package main

import (
	"flag"
	"log"
	"log/slog"
	"net/http"
	"net/http/httputil"
	"net/url"
	"os"
	"time"
)

// observer notes status and bytes for the access log. Unwrap lets Flush and Hijack through.
type observer struct {
	http.ResponseWriter
	status int
	bytes  int64
}

func (o *observer) WriteHeader(status int) {
	o.status = status
	o.ResponseWriter.WriteHeader(status)
}

func (o *observer) Write(part []byte) (int, error) {
	written, err := o.ResponseWriter.Write(part)
	o.bytes += int64(written)
	return written, err
}

func (o *observer) Unwrap() http.ResponseWriter { return o.ResponseWriter }

// runProxy is httputil.NewSingleHostReverseProxy with an access log, as people write it: with the default transport (two
// idle connections per host), or with a pool. The line is written after ServeHTTP, not in a defer, as is usual: a
// response that upstream or client cuts panics past it and leaves no record.
func runProxy(arguments []string) {
	options := flag.NewFlagSet("proxy", flag.ExitOnError)
	listen := options.String("listen", "", "address")
	upstream := options.String("upstream", "", "URL")
	logFile := options.String("log-file", "", "path")
	idle := options.Int("idle", 0, "idle connections kept per host; 0 is Go's default transport")
	certificate := options.String("cert", "", "serve TLS with this certificate")
	key := options.String("key", "", "and this key")
	options.Parse(arguments)
	target, err := url.Parse(*upstream)
	if err != nil {
		log.Fatal(err)
	}
	file, err := os.OpenFile(*logFile, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o644)
	if err != nil {
		log.Fatal(err)
	}
	lines := slog.New(slog.NewJSONHandler(file, nil))
	proxy := httputil.NewSingleHostReverseProxy(target)
	if *idle > 0 {
		transport := http.DefaultTransport.(*http.Transport).Clone()
		transport.MaxIdleConns = 0
		transport.MaxIdleConnsPerHost = *idle
		proxy.Transport = transport
	}
	server := &http.Server{Addr: *listen, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		begun := time.Now()
		seen := &observer{ResponseWriter: w, status: 200}
		proxy.ServeHTTP(seen, r)
		lines.Info("request", "client", r.RemoteAddr, "method", r.Method, "target", r.RequestURI, "status", seen.status,
			"bytes", seen.bytes, "duration_s", time.Since(begun).Seconds())
	})}
	if *certificate != "" {
		log.Fatal(server.ListenAndServeTLS(*certificate, *key))
	}
	log.Fatal(server.ListenAndServe())
}
