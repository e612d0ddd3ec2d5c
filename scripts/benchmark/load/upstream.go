package main

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"flag"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"strconv"
	"time"
)

// chunkSize is what Go's io.Copy writes at a time, and so what a docker push or pull looks like on the wire.
const chunkSize = 32 << 10

// framedPattern is the pattern as chunks: written whole, so that framing costs the upstream nothing.
var framedPattern = frame()

func frame() []byte {
	var framed bytes.Buffer
	for at := 0; at < patternSize; at += chunkSize {
		fmt.Fprintf(&framed, "%x\r\n", chunkSize)
		framed.Write(pattern[at : at+chunkSize])
		framed.WriteString("\r\n")
	}
	return framed.Bytes()
}

// runUpstream serves the paths below. It works on bare connections: net/http's server copies through 4 KiB buffers,
// which would make it the bottleneck.
func runUpstream(arguments []string) {
	options := flag.NewFlagSet("upstream", flag.ExitOnError)
	listen := options.String("listen", "", "address")
	certificate := options.String("cert", "", "serve TLS with this certificate")
	key := options.String("key", "", "and this key")
	options.Parse(arguments)
	listener, err := net.Listen("tcp", *listen)
	if err != nil {
		log.Fatal(err)
	}
	if *certificate != "" {
		pair, err := tls.LoadX509KeyPair(*certificate, *key)
		if err != nil {
			log.Fatal(err)
		}
		listener = tls.NewListener(listener, &tls.Config{Certificates: []tls.Certificate{pair}})
	}
	for {
		connection, err := listener.Accept()
		if err != nil {
			log.Fatal(err)
		}
		go serveConnection(connection)
	}
}

func serveConnection(connection net.Conn) {
	defer connection.Close()
	reader := bufio.NewReaderSize(connection, 16<<10)
	for {
		request, err := http.ReadRequest(reader)
		if err != nil {
			return
		}
		if !answer(connection, reader, request) {
			return
		}
	}
}

// answer writes the response of one request. It returns whether the connection can take another.
func answer(connection net.Conn, reader *bufio.Reader, request *http.Request) bool {
	query := request.URL.Query()
	number := func(name string) int64 {
		value, err := strconv.ParseInt(query.Get(name), 10, 64)
		if err != nil {
			return 0
		}
		return value
	}
	var err error
	switch request.URL.Path {
	case "/bytes":
		err = sendBytes(connection, number("n"))
	case "/chunked":
		err = sendChunked(connection, number("n"))
	case "/sink":
		err = receive(connection, request)
	case "/lines":
		err = sendLines(connection, number("n"), time.Duration(number("every_us"))*time.Microsecond)
	case "/tunnel":
		fmt.Fprintf(connection, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n\r\n")
		tunnel(connection, reader, query.Get("do"), number("n"))
		return false
	default:
		_, err = io.WriteString(connection, "HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
	}
	return err == nil && !request.Close
}

func sendBytes(connection net.Conn, total int64) error {
	head := fmt.Sprintf("HTTP/1.1 200 OK\r\nContent-Type: application/octet-stream\r\nContent-Length: %d\r\n\r\n", total)
	if total < patternSize {
		_, err := connection.Write(append([]byte(head), pattern[:total]...))
		return err
	}
	if _, err := io.WriteString(connection, head); err != nil {
		return err
	}
	return sendPattern(connection, total)
}

func sendPattern(connection io.Writer, total int64) error {
	for total > 0 {
		part := pattern
		if total < patternSize {
			part = pattern[:total]
		}
		if _, err := connection.Write(part); err != nil {
			return err
		}
		total -= int64(len(part))
	}
	return nil
}

// sendFramed writes total bytes, a multiple of the pattern, as chunks, and the last chunk.
func sendFramed(connection io.Writer, total int64) error {
	for sent := int64(0); sent < total; sent += patternSize {
		if _, err := connection.Write(framedPattern); err != nil {
			return err
		}
	}
	_, err := io.WriteString(connection, "0\r\n\r\n")
	return err
}

const chunkedHead = "HTTP/1.1 200 OK\r\nContent-Type: application/octet-stream\r\nTransfer-Encoding: chunked\r\n\r\n"

func sendChunked(connection net.Conn, total int64) error {
	if _, err := io.WriteString(connection, chunkedHead); err != nil {
		return err
	}
	return sendFramed(connection, total)
}

// receive reads a request body and says what it got; the client compares.
func receive(connection net.Conn, request *http.Request) error {
	check := newVerifier()
	if _, err := io.CopyBuffer(check, struct{ io.Reader }{request.Body}, make([]byte, 256<<10)); err != nil {
		return err
	}
	text := fmt.Sprintf("%d %d\n", check.position, check.wrongAt)
	_, err := fmt.Fprintf(connection, "HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s", len(text), text)
	return err
}

const lineSize = 100

// sendLines sends lines of 100 bytes, a chunk and a write each, with the time of the write in them.
// No count means without end: until the write fails.
func sendLines(connection net.Conn, count int64, every time.Duration) error {
	if _, err := io.WriteString(connection, chunkedHead); err != nil {
		return err
	}
	filler := bytes.Repeat([]byte("."), lineSize)
	next := time.Now()
	for sequence := int64(0); count == 0 || sequence < count; sequence++ {
		line := fmt.Appendf(make([]byte, 0, lineSize+8), "%x\r\n%020d %010d ", lineSize, monotonicNs(), sequence)
		line = append(line, filler[:lineSize-20-10-2-1]...)
		line = append(line, "\n\r\n"...)
		if _, err := connection.Write(line); err != nil {
			return err
		}
		next = next.Add(every)
		time.Sleep(time.Until(next))
	}
	_, err := io.WriteString(connection, "0\r\n\r\n")
	return err
}

func tunnel(connection net.Conn, reader *bufio.Reader, do string, total int64) {
	switch do {
	case "echo":
		buffer := make([]byte, 4096)
		for {
			length, err := reader.Read(buffer)
			if err != nil {
				return
			}
			if _, err := connection.Write(buffer[:length]); err != nil {
				return
			}
		}
	case "down":
		if sendPattern(connection, total) == nil {
			io.Copy(io.Discard, reader) // the client hangs up first, so that no octet is cut off
		}
	case "up":
		check := newVerifier()
		io.CopyBuffer(check, io.LimitReader(reader, total), make([]byte, 256<<10))
		fmt.Fprintf(connection, "%d %d\n", check.position, check.wrongAt)
		io.Copy(io.Discard, reader)
	}
}
