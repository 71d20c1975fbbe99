// Package scheduler decides which machine runs which build.
//
// It is pure: it does no I/O, starts no goroutine, takes no lock, reads no
// clock and draws no random number. A [Queue] is told what happened, one call
// an event, and answers with orders: what must be done now because of it. The
// same events always give the same orders.
//
// # Two resources
//
// A machine has build slots (max-jobs of them) and staging places. A build
// passes through these phases:
//
//	queued    on no machine
//	staging   placed on a machine: its inputs travel there
//	staged    its inputs are there: it waits for a build slot
//	running   it holds a build slot: the remote build runs
//	fetching  the remote build has ended: its outputs travel back
//	lost      the transport died while it ran: its slot is held
//
// The builds that are staging, staged or running are the placed ones. A
// machine's load is its placed builds plus its held slots. A slot is granted
// when the inputs are there, so a small build overtakes one whose inputs take an
// hour. A machine whose load is
// below max-jobs has a free slot; one whose load is below max-jobs plus its
// staging places can still take a build whose inputs travel while the slots
// are busy. A fetching build holds neither.
//
// # Choice
//
// A machine is eligible when it supports the build's system, supports all
// required features (mandatory features count as supported) and all its
// mandatory features are required (Nix 2.34.8, src/libstore/machines.cc). Among
// the eligible machines that are up and have a free slot: lowest
// load/speedFactor, then higher speed factor, then lower load, then first in
// the list (src/nix/build-remote/build-remote.cc). When none has a free slot,
// the same rule chooses among those with a free staging place. A build waits in
// the queue only while no eligible machine has either.
//
// # Lists and shared slots
//
// Machines stand in lists, and a build goes to those of its own list only.
//
// Machines with the same store URI, in whatever list, are one host and share
// slots, as they do in stock Nix, where slots are lock files named after the URI
// and a number: each may use the first max-jobs of them. So no more builds run
// there than the largest max-jobs says, and no more on one machine than its own.
// A slot's number means nothing by itself: a build is granted one whenever the
// running builds could be numbered so that each is within its own machine's. The
// load of such a machine, for the choice, is how many of the slots that it may
// use are spoken for. A build that failed on a machine avoids all with its URI.
//
// # The order of builds
//
// The queue's order: higher priority, then the caller with fewest placed
// builds, then the caller whose last placing is longest ago, then the build asked for
// first, then, of those asked for together, the one with the longest chain of
// derivations that wait for it, then oldest. The chain is what a whole graph takes at
// least, however many machines there are.
//
// A slot goes, among the builds whose inputs are there, by higher priority, then to the
// caller with fewest running builds, then to the one whose last slot is longest
// ago, then to the build placed first.
//
// Nobody's turn comes while others' builds fill the staging places, so each machine
// has as many again for those who have no build in line: a build may take one if no
// other place is free and its caller has no placed build without a slot; or, if its
// priority is above 0, only ones of a lower priority. So a caller's only build gets
// the next slot of its machine, whatever others have queued. A build that another caller wants, too,
// goes by the better turn of both.
//
// A build that has no slot yet is moved when its machine has more builds than
// slots, or takes no builds any more, while another eligible machine has a free
// slot that no queued build can use.
//
// # The caller's duties
//
//  1. Serialise all calls to a Queue and carry out the orders in their order.
//  2. On [Place] and [Move], copy the inputs to the machine, then call
//     [Queue.Staged] with that machine.
//  3. On [Grant], start the build; call [Queue.Built] at its confirmed end,
//     [Queue.Lost] when the transport died and nobody knows.
//  4. On [Withdraw], leave the machine and wait for the next order.
//  5. When a machine fails a build, tell the machine's state first if that changed
//     too (else the build may be placed on a dead machine), then [Queue.Requeue] or
//     Remove. Bound the number of attempts: the Queue does not. A build that is to
//     rest from the machine does so until [Queue.EndRest].
//  6. Call [Queue.Remove] once when the build is done with, in whatever phase.
//
// An order can cross an event of the same build on its way (it is moved just
// as its upload ends or fails); Staged and Requeue therefore name the machine
// they speak of, and do nothing to a build that has left it.
//
// Call with a build that is not in the right phase, or that is unknown, and the
// Queue panics: that is a bug of the caller, never a matter of input.
package scheduler
