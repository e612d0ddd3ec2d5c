// The proxy of the origin story: net/http/httputil as its documentation shows it, behind a server with two time limits.
//
// It logs what it is given to log: the start of each request, and whatever net/http itself has to say.
package main

import (
	"flag"
	"log"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"time"
)

func main() {
	upstream := flag.String("upstream", "", "http://host:port of the docker daemon")
	readTimeout := flag.Duration("read-timeout", 5*time.Second, "ReadTimeout of the server")
	writeTimeout := flag.Duration("write-timeout", 10*time.Second, "WriteTimeout of the server")
	flag.Parse()

	target, err := url.Parse(*upstream)
	if err != nil {
		log.Fatal(err)
	}
	proxy := httputil.NewSingleHostReverseProxy(target)
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		log.Fatal(err)
	}
	server := &http.Server{
		ReadTimeout:  *readTimeout,
		WriteTimeout: *writeTimeout,
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			log.Printf("request start %s %s", r.Method, r.URL.Path)
			proxy.ServeHTTP(w, r)
		}),
	}
	log.Printf("listening on %s", listener.Addr())
	log.Fatal(server.Serve(listener))
}
