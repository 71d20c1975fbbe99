package sshpool

import (
	"testing"
	"time"
)

func TestBackoffGrowsToItsBoundWithJitter(t *testing.T) {
	seen := make(map[time.Duration]bool)
	for range 50 {
		b := Backoff{Min: time.Second, Max: 60 * time.Second}
		for i, want := range []int{1, 2, 4, 8, 16, 32, 60, 60, 60, 60} {
			mean := time.Duration(want) * time.Second
			d := b.Next()
			if d < mean/2 || d > mean*3/2 {
				t.Fatalf("pause %d is %v, want within half of %v", i, d, mean)
			}
			if i == 0 {
				seen[d] = true
			}
		}
		b.Reset()
		if d := b.Next(); d > 1500*time.Millisecond {
			t.Fatalf("pause after reset is %v", d)
		}
	}
	if len(seen) < 10 {
		t.Errorf("50 first pauses have %d values", len(seen))
	}
}
