/* SPDX-License-Identifier: Apache-2.0
 *
 * The gate of pvclock/kvm/_gate.pyx, for SPIN: vCPUs, a holder, a pauser and a resumer, in every order of their steps.
 *
 * Its words are sequentially consistent, so each load, store and addition is one step here.  A futex wait is one, too:
 * it blocks until the word is not what was seen, for whoever changes the word wakes all.  Nobody here has a timeout,
 * so a wakeup that is lost is a deadlock, and a kick that is lost is one: a guest never exits by itself.
 *
 * Without options this is the design.  Each of these leaves one rule out:
 *
 *   -DVCPU_LOOKS_FIRST    a vCPU looks at the gate before it says that it is in
 *   -DHOLDER_LOOKS_FIRST  a holder looks who is in before it shuts the gate
 *   -DLEAVES_IN_SILENCE   a vCPU that leaves tells nobody
 *   -DOPENS_IN_SILENCE    nobody is told when a hold is given back
 *   -DSEEN_TOO_LATE       who waits remembers the count of changes after it has looked
 *   -DNO_KICK             a holder does not ask vCPUs to exit
 */
#define VCPUS 2

bool in_guest[VCPUS];   /* what a vCPU says */
bool inside[VCPUS];     /* where it is */
bool kicked[VCPUS];
byte holds;
bool paused, ended;
bool changed[4];        /* has the count of changes gone on since this waiter saw it? */

byte held;              /* holders that have seen all vCPUs out, and not given back */
bool lock;              /* the holder's; a vCPU that is out may wait for it, and for nothing else */
bool has_paused;
byte left_to_do = 3;    /* holder, pauser, resumer */

#define SHUT (holds || paused || ended)
#define TELL atomic { changed[0] = true; changed[1] = true; changed[2] = true; changed[3] = true }
#define HOLDER 2
#define PAUSER 3

inline look_until_all_are_out(waiter)
{
	do
	:: true ->
		atomic { someone = false; me = 0 }
#ifndef SEEN_TOO_LATE
		changed[waiter] = false;
#endif
		do
		:: me < VCPUS ->
			if
			:: in_guest[me] ->
				someone = true;
#ifndef NO_KICK
				kicked[me] = true
#endif
			:: else
			fi;
			me++
		:: else -> break
		od;
		if
		:: !someone -> break
		:: else
		fi;
#ifdef SEEN_TOO_LATE
		changed[waiter] = false;
#endif
		changed[waiter]
	od
}

inline hold(waiter)
{
#ifdef HOLDER_LOOKS_FIRST
	look_until_all_are_out(waiter);
	holds++
#else
	holds++;
	look_until_all_are_out(waiter)
#endif
	;
	atomic { held++; assert(!inside[0] && !inside[1]) }
}

inline give_back()
{
	atomic { held--; holds-- }
#ifndef OPENS_IN_SILENCE
	TELL
#endif
}

proctype vcpu(byte v)
{
	bool shut;

outside:
#ifdef VCPU_LOOKS_FIRST
	shut = SHUT;
	in_guest[v] = true;
#else
	in_guest[v] = true;
	shut = SHUT;
#endif
	if
	:: !shut
	:: else -> goto turned_away
	fi;
	atomic { inside[v] = true; assert(!held && !paused) }
	kicked[v];                      /* KVM_RUN returns */
	atomic { inside[v] = false }
	kicked[v] = false;
	in_guest[v] = false;
	shut = SHUT;
	if
#ifndef LEAVES_IN_SILENCE
	:: shut -> TELL
#endif
	:: else
	fi;
	if                              /* its exit is served */
	:: true
	:: true -> !lock
	fi;
	goto outside;

turned_away:
	in_guest[v] = false;
	TELL;
	do
	:: true ->
#ifndef SEEN_TOO_LATE
		changed[v] = false;
#endif
		if
		:: ended -> goto done
		:: else
		fi;
		shut = SHUT;
		if
		:: !shut -> goto outside
		:: else
		fi;
#ifdef SEEN_TOO_LATE
		changed[v] = false;
#endif
		changed[v]
	od;
done:
	skip
}

proctype holder()
{
	byte me;
	bool someone;

	lock = true;
	hold(HOLDER);
	give_back();
	lock = false;
	left_to_do--
}

proctype pauser()
{
	byte me;
	bool someone;

	hold(PAUSER);
	paused = true;
	give_back();
	has_paused = true;
	left_to_do--
}

proctype resumer()
{
	has_paused;                     /* one last resume: nothing but a hold keeps vCPUs out from now on */
	paused = false;
	TELL;
	left_to_do--
}

/* A second resume, at any time. */
proctype meddler()
{
	paused = false;
	TELL
}

/* Once all are in again the run ends, by one look at who is in. */
proctype ender()
{
	byte me;

	left_to_do == 0 && inside[0] && inside[1];
	ended = true;
	TELL;
	do
	:: me < VCPUS ->
		if
		:: in_guest[me] -> kicked[me] = true
		:: else
		fi;
		me++
	:: else -> break
	od
}

init
{
	atomic {
		run vcpu(0);
		run vcpu(1);
		run holder();
		run pauser();
		run resumer();
		run meddler();
		run ender()
	}
}
