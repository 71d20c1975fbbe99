// Package prometheus is what watches nix-dispatchd with Prometheus and Grafana:
// a scrape configuration, rules and a dashboard.
package prometheus

import "embed"

// Files are scrape.yml, rules.yml and dashboard.json.
//
//go:embed scrape.yml rules.yml dashboard.json
var Files embed.FS
