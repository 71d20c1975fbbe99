package main

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"log/slog"
	"os"
	"time"

	"golang.org/x/sync/errgroup"

	"nixdispatch/proto/nix"
	"nixdispatch/proto/nix/serve"
	"nixdispatch/sshpool"
)

// perMachine is how many builds run on a machine at a time.
const perMachine = 4

// machines builds the derivations that standard input names, over connections
// and remote processes that are there, and prints how many seconds that took.
func machines(hosts []string) error {
	pool := sshpool.New(sshpool.Options{Logger: slog.New(slog.NewTextHandler(os.Stderr, nil))})
	defer pool.Close()
	var procs []*serve.Client
	for _, name := range hosts {
		host := pool.Add(sshpool.Config{Name: name, Host: name, User: "root"})
		for range perMachine {
			c, err := start(host)
			if err != nil {
				return fmt.Errorf("%s: %w", name, err)
			}
			procs = append(procs, c)
		}
	}
	type work struct {
		drvPath nix.StorePath
		drv     *nix.Derivation
	}
	var all []work
	lines := bufio.NewScanner(os.Stdin)
	for lines.Scan() {
		drvPath, drv, err := readDerivation(lines.Text())
		if err != nil {
			return err
		}
		all = append(all, work{drvPath, drv})
	}
	todo := make(chan work, len(all))
	for _, w := range all {
		todo <- w
	}
	close(todo)
	started := time.Now()
	var builders errgroup.Group
	for _, c := range procs {
		builders.Go(func() error {
			for w := range todo {
				if err := buildOne(c, w.drvPath, w.drv); err != nil {
					return err
				}
			}
			return nil
		})
	}
	if err := builders.Wait(); err != nil {
		return err
	}
	fmt.Printf("%.4f\n", time.Since(started).Seconds())
	return nil
}

// start starts a remote process as soon as its host is connected to.
func start(host *sshpool.Host) (*serve.Client, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	for {
		s, err := host.Session(ctx, "nix-store --serve --write")
		if err == nil {
			go io.Copy(io.Discard, s.Stderr) //nolint:errcheck // it ends with the process
			return serve.NewClient(s.Stdout, s.Stdin)
		}
		select {
		case <-time.After(20 * time.Millisecond): // it is connecting
		case <-ctx.Done():
			return nil, err
		}
	}
}

// buildOne builds a derivation without inputs and reads its outputs.
func buildOne(c *serve.Client, drvPath nix.StorePath, drv *nix.Derivation) error {
	basic := drv.Basic(nil)
	r, err := c.BuildDerivation(drvPath, &basic, nix.BuildOptions{})
	if err != nil {
		return err
	}
	if !r.Status.Success() {
		return fmt.Errorf("%s: %v: %s", drvPath, r.Status, r.ErrorMsg)
	}
	for _, p := range drv.OutputPaths() {
		infos, err := c.QueryPathInfos([]nix.StorePath{p})
		if err != nil {
			return err
		}
		if len(infos) != 1 {
			return fmt.Errorf("%s is not valid after its build", p)
		}
		if _, err := c.DumpStorePath(p, infos[0].NarSize, io.Discard); err != nil {
			return err
		}
	}
	return nil
}
