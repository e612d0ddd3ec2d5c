// Command load is the helper of scripts/bench: the upstream, the load clients and the two Go proxies it compares with.
// One binary, so that nothing but the Go tool chain is needed to build it, and one place that knows what a right
// response looks like: client and upstream share the pattern every body is checked against.
package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"sort"
	"syscall"
	"time"
	"unsafe"
)

const patternSize = 1 << 20

// pattern is the content of every bulk body, repeated. Random bytes, so that lost, doubled or swapped octets show.
var pattern = makePattern()

func makePattern() []byte {
	filled := make([]byte, patternSize)
	state := uint64(0x9E3779B97F4A7C15)
	for at := 0; at < patternSize; at += 8 {
		state ^= state << 13
		state ^= state >> 7
		state ^= state << 17
		*(*uint64)(unsafe.Pointer(&filled[at])) = state
	}
	return filled
}

// verifier compares a stream with the pattern; memory comparison costs the client a few percent of the relay.
type verifier struct {
	position int64
	wrongAt  int64 // offset of the first wrong block, or -1
}

func newVerifier() *verifier { return &verifier{wrongAt: -1} }

func (v *verifier) Write(part []byte) (int, error) {
	length := len(part)
	for len(part) > 0 {
		expected := pattern[v.position%patternSize:]
		if len(expected) > len(part) {
			expected = expected[:len(part)]
		}
		if v.wrongAt < 0 && !bytes.Equal(part[:len(expected)], expected) {
			v.wrongAt = v.position
		}
		part = part[len(expected):]
		v.position += int64(len(expected))
	}
	return length, nil
}

func (v *verifier) check(total int64) error {
	if v.position != total {
		return fmt.Errorf("%d bytes instead of %d", v.position, total)
	}
	if v.wrongAt >= 0 {
		return fmt.Errorf("wrong content near byte %d", v.wrongAt)
	}
	return nil
}

// monotonicNs reads CLOCK_MONOTONIC, which all processes of a machine share; Go's own monotonic reading is private.
func monotonicNs() int64 {
	var now syscall.Timespec
	_, _, failure := syscall.RawSyscall(syscall.SYS_CLOCK_GETTIME, 1, uintptr(unsafe.Pointer(&now)), 0)
	if failure != 0 {
		panic(failure)
	}
	return now.Nano()
}

// quantile of samples in the unit they come in; it sorts them.
func quantile(samples []float64, share float64) float64 {
	if len(samples) == 0 {
		return 0
	}
	sort.Float64s(samples)
	return samples[int(share*float64(len(samples)-1))]
}

// result is what a client prints: one line of JSON. Errors holds at most a few; Failed counts all.
type result struct {
	Seconds float64            `json:"seconds"`
	Done    int64              `json:"done"`
	Failed  int64              `json:"failed"`
	Errors  []string           `json:"errors"`
	Figures map[string]float64 `json:"figures"`
	Cipher  string             `json:"cipher"`
}

func (r *result) fail(err error) {
	r.Failed++
	if len(r.Errors) < 3 {
		r.Errors = append(r.Errors, err.Error())
	}
}

func (r *result) print() {
	if r.Errors == nil {
		r.Errors = []string{}
	}
	if err := json.NewEncoder(os.Stdout).Encode(r); err != nil {
		panic(err)
	}
}

func seconds(since time.Time) float64 { return time.Since(since).Seconds() }

func main() {
	commands := map[string]func([]string){
		"upstream": runUpstream,
		"proxy":    runProxy,
		"transfer": runTransfer,
		"lines":    runLines,
		"pingpong": runPingPong,
		"storm":    runStorm,
	}
	if len(os.Args) > 1 {
		if command, known := commands[os.Args[1]]; known {
			command(os.Args[2:])
			return
		}
	}
	fmt.Fprintln(os.Stderr, "usage: load upstream|proxy|transfer|lines|pingpong|storm [options]")
	os.Exit(2)
}
