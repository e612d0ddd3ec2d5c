package main

import (
	"bufio"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"flag"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"
)

// destination is where a client connects: an address, and a CA file if it speaks TLS.
type destination struct {
	address string
	config  *tls.Config
}

func (d *destination) options(set *flag.FlagSet) {
	set.StringVar(&d.address, "target", "", "address")
	set.Func("ca", "speak TLS and trust this file", func(path string) error {
		text, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		pool := x509.NewCertPool()
		if !pool.AppendCertsFromPEM(text) {
			return errors.New("no certificate in " + path)
		}
		d.config = &tls.Config{RootCAs: pool, ServerName: "localhost"}
		return nil
	})
}

// peer is one client connection.
type peer struct {
	net.Conn
	reader *bufio.Reader
}

func (d *destination) connect(buffer int) (*peer, error) {
	connection, err := net.DialTimeout("tcp", d.address, 10*time.Second)
	if err != nil {
		return nil, err
	}
	if d.config != nil {
		secured := tls.Client(connection, d.config)
		if err := secured.Handshake(); err != nil {
			connection.Close()
			return nil, err
		}
		connection = secured
	}
	return &peer{connection, bufio.NewReaderSize(connection, buffer)}, nil
}

func (p *peer) request(method, target, fields string) error {
	_, err := fmt.Fprintf(p, "%s %s HTTP/1.1\r\nHost: localhost\r\nUser-Agent: bench\r\n%s\r\n", method, target, fields)
	return err
}

func (p *peer) response(method string, status int) (*http.Response, error) {
	response, err := http.ReadResponse(p.reader, &http.Request{Method: method})
	if err != nil {
		return nil, fmt.Errorf("no response: %w", err)
	}
	if response.StatusCode != status {
		text, _ := io.ReadAll(io.LimitReader(response.Body, 200))
		return nil, fmt.Errorf("status %d instead of %d: %.100s", response.StatusCode, status, text)
	}
	return response, nil
}

// download reads a body to its end and compares it with the pattern.
func download(body io.Reader, total int64, buffer []byte) error {
	check := newVerifier()
	if _, err := io.CopyBuffer(check, struct{ io.Reader }{body}, buffer); err != nil {
		return fmt.Errorf("after %d bytes: %w", check.position, err)
	}
	return check.check(total)
}

// acknowledged compares what the upstream says it got with what was sent.
func acknowledged(text string, total int64) error {
	if expected := fmt.Sprintf("%d -1", total); strings.TrimSpace(text) != expected {
		return fmt.Errorf("upstream got %.60q instead of %q", text, expected)
	}
	return nil
}

func (p *peer) transfer(kind string, total int64, buffer []byte) error {
	switch kind {
	case "down", "chunked-down":
		path := map[string]string{"down": "/bytes", "chunked-down": "/chunked"}[kind]
		if err := p.request("GET", path+"?n="+strconv.FormatInt(total, 10), ""); err != nil {
			return err
		}
		response, err := p.response("GET", 200)
		if err != nil {
			return err
		}
		if kind == "down" && response.ContentLength != total {
			return fmt.Errorf("Content-Length %d instead of %d", response.ContentLength, total)
		}
		return download(response.Body, total, buffer)
	case "up", "chunked-up":
		framing, send := fmt.Sprintf("Content-Length: %d\r\n", total), sendPattern
		if kind == "chunked-up" {
			framing, send = "Transfer-Encoding: chunked\r\n", sendFramed
		}
		if err := p.request("POST", "/sink", framing); err != nil {
			return err
		}
		if err := send(p, total); err != nil {
			return err
		}
		response, err := p.response("POST", 200)
		if err != nil {
			return err
		}
		text, err := io.ReadAll(response.Body)
		if err != nil {
			return err
		}
		return acknowledged(string(text), total)
	case "tunnel-down", "tunnel-up":
		do := strings.TrimPrefix(kind, "tunnel-")
		if err := p.upgrade(fmt.Sprintf("/tunnel?do=%s&n=%d", do, total)); err != nil {
			return err
		}
		if do == "down" {
			return download(io.LimitReader(p.reader, total), total, buffer)
		}
		if err := sendPattern(p, total); err != nil {
			return err
		}
		text, err := p.reader.ReadString('\n')
		if err != nil {
			return err
		}
		return acknowledged(text, total)
	}
	return errors.New("unknown kind " + kind)
}

func (p *peer) upgrade(target string) error {
	if err := p.request("GET", target, "Connection: Upgrade\r\nUpgrade: tcp\r\n"); err != nil {
		return err
	}
	_, err := p.response("GET", 101)
	return err
}

// runTransfer moves bodies one after another over one connection (a tunnel: over one each).
func runTransfer(arguments []string) {
	var to destination
	options := flag.NewFlagSet("transfer", flag.ExitOnError)
	to.options(options)
	kind := options.String("kind", "down", "[chunked-|tunnel-]down or -up")
	total := options.Int64("bytes", patternSize, "length of a body; a multiple of 1 MiB where it is chunked")
	repeat := options.Int("repeat", 1, "bodies; 0 is until standard input ends")
	options.Parse(arguments)
	if len(arguments) == 0 || *total%patternSize != 0 && strings.HasPrefix(*kind, "chunked") {
		log.Fatal("bad options")
	}
	stop := make(chan struct{})
	if *repeat == 0 {
		go func() {
			io.Copy(io.Discard, os.Stdin)
			close(stop)
		}()
	}
	outcome := result{}
	begun := time.Now()
	var connection *peer
	buffer := make([]byte, 256<<10)
bodies:
	for turn := 0; *repeat == 0 || turn < *repeat; turn++ {
		select {
		case <-stop:
			break bodies
		default:
		}
		if connection == nil || strings.HasPrefix(*kind, "tunnel") {
			opened, err := to.connect(64 << 10)
			if err != nil {
				outcome.fail(err)
				break
			}
			defer opened.Close()
			connection = opened
		}
		if err := connection.transfer(*kind, *total, buffer); err != nil {
			outcome.fail(err)
			break
		}
		outcome.Done++
	}
	outcome.Seconds = seconds(begun)
	if connection != nil {
		if secured, isTLS := connection.Conn.(*tls.Conn); isTLS {
			outcome.Cipher = tls.CipherSuiteName(secured.ConnectionState().CipherSuite)
		}
	}
	outcome.print()
}

// readLines reads a response of lines and gives the delay of each, in microseconds, to each.
func readLines(body io.Reader, count int, each func(sequence int, delayUs float64)) error {
	lines := bufio.NewReaderSize(body, 4096)
	for sequence := 0; sequence < count; sequence++ {
		line, err := lines.ReadSlice('\n')
		arrived := monotonicNs()
		if err != nil {
			return fmt.Errorf("line %d: %w", sequence, err)
		}
		if len(line) != lineSize {
			return fmt.Errorf("line %d has %d bytes", sequence, len(line))
		}
		sent, err := strconv.ParseInt(string(line[:20]), 10, 64)
		if err != nil {
			return err
		}
		if number, err := strconv.Atoi(string(line[21:31])); err != nil || number != sequence {
			return fmt.Errorf("line %d says it is %q", sequence, line[21:31])
		}
		each(sequence, float64(arrived-sent)/1e3)
	}
	if _, err := lines.ReadByte(); err != io.EOF {
		return fmt.Errorf("no clean end after the last line: %v", err)
	}
	return nil
}

// runLines holds streams of lines. With -ready it prints "ready" when each has had its first line, so that memory can be
// read while all are open.
func runLines(arguments []string) {
	var to destination
	options := flag.NewFlagSet("lines", flag.ExitOnError)
	to.options(options)
	streams := options.Int("streams", 1, "streams at once")
	count := options.Int("lines", 100, "lines per stream")
	every := options.Duration("every", 5*time.Millisecond, "between two lines of a stream")
	ready := options.Bool("ready", false, "print ready once all streams have begun")
	options.Parse(arguments)

	var lock sync.Mutex // guards outcome, delays and waiting
	outcome := result{}
	delays := make([]float64, 0, *streams**count)
	waiting := *streams
	arrived := func() {
		lock.Lock()
		defer lock.Unlock()
		if waiting--; waiting == 0 && *ready {
			fmt.Println("ready")
		}
	}
	begun := time.Now()
	var all sync.WaitGroup
	opening := make(chan struct{}, 64) // connects at a time: a backlog that overflows costs a second each
	for number := 0; number < *streams; number++ {
		opening <- struct{}{}
		all.Add(1)
		go func() {
			defer all.Done()
			own := make([]float64, 0, *count)
			opened := false
			open := func() {
				if !opened {
					opened = true
					<-opening
					arrived()
				}
			}
			err := func() error {
				connection, err := to.connect(4096)
				if err != nil {
					return err
				}
				defer connection.Close()
				if err := connection.request("GET", fmt.Sprintf("/lines?n=%d&every_us=%d", *count, every.Microseconds()), ""); err != nil {
					return err
				}
				response, err := connection.response("GET", 200)
				if err != nil {
					return err
				}
				return readLines(response.Body, *count, func(sequence int, delayUs float64) {
					open()
					if sequence > 0 { // the first comes with the head
						own = append(own, delayUs)
					}
				})
			}()
			open()
			lock.Lock()
			defer lock.Unlock()
			if err != nil {
				outcome.fail(err)
				return
			}
			outcome.Done++
			delays = append(delays, own...)
		}()
	}
	all.Wait()
	outcome.Seconds = seconds(begun)
	outcome.Figures = map[string]float64{"p50_us": quantile(delays, 0.50), "p99_us": quantile(delays, 0.99)}
	outcome.print()
}

// runPingPong sends one byte through a tunnel and waits for its echo.
func runPingPong(arguments []string) {
	var to destination
	options := flag.NewFlagSet("pingpong", flag.ExitOnError)
	to.options(options)
	count := options.Int("count", 1000, "round trips")
	options.Parse(arguments)
	outcome := result{}
	begun := time.Now()
	times := make([]float64, 0, *count)
	err := func() error {
		connection, err := to.connect(4096)
		if err != nil {
			return err
		}
		defer connection.Close()
		if err := connection.upgrade("/tunnel?do=echo"); err != nil {
			return err
		}
		for turn := 0; turn < *count; turn++ {
			sent := monotonicNs()
			if _, err := connection.Write([]byte{byte(turn)}); err != nil {
				return err
			}
			back, err := connection.reader.ReadByte()
			if err != nil {
				return err
			}
			if back != byte(turn) {
				return fmt.Errorf("echo %d instead of %d", back, byte(turn))
			}
			times = append(times, float64(monotonicNs()-sent)/1e3)
			outcome.Done++
		}
		return nil
	}()
	if err != nil {
		outcome.fail(err)
	}
	outcome.Seconds = seconds(begun)
	outcome.Figures = map[string]float64{"p50_us": quantile(times, 0.50), "p99_us": quantile(times, 0.99)}
	outcome.print()
}
