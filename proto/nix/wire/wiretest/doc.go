// Package wiretest has what the fake servers of packages servetest and
// workertest share: a store in memory, NARs to put into it, and a two-way pipe.
//
// It is for tests only.
package wiretest
