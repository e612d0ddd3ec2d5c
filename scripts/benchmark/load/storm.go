package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

// others are well-behaved clients that ask at a fixed rate, so that the figure tells what the proxy makes of a storm
// and not how a closed loop shares two cores with it.
type others struct {
	answered atomic.Int64
	lock     sync.Mutex // guards outcome and delays
	outcome  *result
	delays   []float64
}

func (o *others) run(to *destination, every time.Duration, stop <-chan struct{}) {
	buffer := make([]byte, 4096)
	err := func() error {
		connection, err := to.connect(4096)
		if err != nil {
			return err
		}
		defer connection.Close()
		ticks := time.NewTicker(every)
		defer ticks.Stop()
		for {
			select {
			case <-stop:
				return nil
			case <-ticks.C:
			}
			sent := monotonicNs()
			if err := connection.transfer("down", 1024, buffer); err != nil {
				return err
			}
			o.answered.Add(1)
			o.lock.Lock()
			o.delays = append(o.delays, float64(monotonicNs()-sent)/1e3)
			o.lock.Unlock()
		}
	}()
	if err != nil {
		o.lock.Lock()
		o.outcome.fail(fmt.Errorf("bystander: %w", err))
		o.lock.Unlock()
	}
}

func (o *others) takeDelays() []float64 {
	o.lock.Lock()
	defer o.lock.Unlock()
	taken := o.delays
	o.delays = nil
	return taken
}

// abortOnce asks for an endless response, reads some of its body and resets the connection.
func abortOnce(to *destination, number int) error {
	connection, err := to.connect(4096)
	if err != nil {
		return err
	}
	defer connection.Close()
	raw, isTCP := connection.Conn.(*net.TCPConn)
	if !isTCP {
		return errors.New("a storm is plain TCP")
	}
	if err := connection.request("GET", fmt.Sprintf("/lines?storm=%d&every_us=20000", number), ""); err != nil {
		return err
	}
	response, err := connection.response("GET", 200)
	if err != nil {
		return err
	}
	if _, err := io.ReadFull(response.Body, make([]byte, 2*lineSize)); err != nil {
		return err
	}
	return raw.SetLinger(0) // the deferred Close then sends RST
}

// runStorm lets bystanders run alone, then beside clients that reset in the middle of a response.
func runStorm(arguments []string) {
	var to destination
	options := flag.NewFlagSet("storm", flag.ExitOnError)
	to.options(options)
	count := options.Int("count", 5000, "clients that reset")
	rate := options.Int("rate", 1000, "of them per second")
	bystanders := options.Int("bystanders", 16, "connections beside the storm")
	bystanderRate := options.Int("bystander-rate", 2000, "their requests per second, all together")
	alone := options.Duration("alone", 2*time.Second, "how long they run before the storm")
	options.Parse(arguments)

	outcome := result{}
	beside := others{outcome: &outcome}
	stop := make(chan struct{})
	var all sync.WaitGroup
	for number := 0; number < *bystanders; number++ {
		all.Add(1)
		go func() {
			defer all.Done()
			beside.run(&to, time.Second*time.Duration(*bystanders)/time.Duration(*bystanderRate), stop)
		}()
	}
	time.Sleep(200 * time.Millisecond) // until all are connected
	beside.takeDelays()
	before, begun := beside.answered.Load(), time.Now()
	time.Sleep(*alone)
	aloneRate := float64(beside.answered.Load()-before) / seconds(begun)
	aloneDelays := beside.takeDelays()

	before, begun = beside.answered.Load(), time.Now()
	var storm sync.WaitGroup
	for number := 0; number < *count; number++ {
		time.Sleep(time.Until(begun.Add(time.Second * time.Duration(number) / time.Duration(*rate))))
		storm.Add(1)
		go func() {
			defer storm.Done()
			err := abortOnce(&to, number)
			beside.lock.Lock()
			defer beside.lock.Unlock()
			if err != nil {
				outcome.fail(err)
			} else {
				outcome.Done++
			}
		}()
	}
	storm.Wait()
	outcome.Seconds = seconds(begun)
	besideRate := float64(beside.answered.Load()-before) / outcome.Seconds
	besideDelays := beside.takeDelays()
	close(stop)
	all.Wait()
	outcome.Figures = map[string]float64{
		"alone_per_s": aloneRate, "beside_per_s": besideRate,
		"alone_p99_us": quantile(aloneDelays, 0.99), "beside_p99_us": quantile(besideDelays, 0.99),
	}
	outcome.print()
}
