/* SPDX-License-Identifier: Apache-2.0
 *
 * The two-phase publish of pvclock_publish.h, for SPIN: every order in which stores, loads and rdtsc can happen.
 * docs/publish-model.md says what is left out, and why that loses no fault.
 *
 * Without options this is the design.  Each of these leaves one rule out:
 *
 *   -DNO_ODD         the versions stay even while the payloads change
 *   -DNO_DRAIN       a bare rdtsc: the odd versions may still be in the store buffer when A is read
 *   -DNO_MARGIN      the break point is A itself
 *   -DNO_WAIT        the new line is let out before its break point
 *   -DPAGE_BY_PAGE   every page has a publish, and so a break point, of its own
 *
 * -DTWO_KINDS makes page 1 Hyper-V's, whose version is a sequence that is 0 while the page is busy.  Of it:
 *
 *   -DBUSY_AFTER_A       its mark comes with its payload, after A
 *   -DRELEASED_BEFORE_B  its release comes with its payload, before B
 *   -DNO_ZERO            its sequence is never 0: it changes at the release
 *   -DSAME_SEQUENCE      its sequence is 0, and then what it was
 *   -DREAD_BACK          its sequence is one more than what guest memory has
 *   -DCOUNTER_LATE       page 0, here Hyper-V's counter, takes the new line over when the publish is over
 *
 * -DWITNESS makes it a fault that the last line is read, to see that the search gets there.  And these give a size:
 * -DPUBLISHES -DTICKS -DMARGIN -DEARLY -DREADS_AT_ONCE.  Where EARLY is more than MARGIN, the guarantee is lost.
 */
#define PAGES 2

#ifndef PUBLISHES
#define PUBLISHES 2
#endif

/* The last tick.  Each publish takes MARGIN ticks; the others are for writers that pause and readers that go on. */
#ifndef TICKS
#define TICKS 7
#endif

#ifdef NO_MARGIN
#define MARGIN 0
#endif
#ifndef MARGIN
#define MARGIN 2
#endif

/* By how many ticks a validating load may overtake its rdtsc: as many as the margin is there for. */
#ifndef EARLY
#define EARLY 2
#endif

/* Readers do not store, so a read cannot change another: a fault of one read shows with no other in flight, and a
 * clock that goes back with two, the first of which has returned when the second begins.
 */
#ifndef READS_AT_ONCE
#define READS_AT_ONCE 1
#endif

/* ---- The TSC, in step on all CPUs.  Whatever else happens takes any number of ticks, or none. ---- */

#define NEVER 255

byte now;
byte rdtsc_by[PAGES] = NEVER; /* when a load has overtaken the rdtsc of a page's reader, that must not lag further */

proctype counter()
{
	do
	:: now < TICKS && now < rdtsc_by[0] && now < rdtsc_by[1] -> now++
	od
}

/* ---- Memory, and the store buffers before it. ---- */

/* A payload is two words, to be torn apart: ANCHOR for tsc_timestamp and system_time, SCALE for mul and shift.  Each
 * holds the number of the line that it belongs to.  Generation n is the n-th publish; its page version is 2n.
 */
#define VERSION(page) (3 * (page))
#define ANCHOR(page) (3 * (page) + 1)
#define SCALE(page) (3 * (page) + 2)
#define LOCK (3 * PAGES) /* how many publishes are complete: whose turn it is */
#define WORDS (LOCK + 1)

byte memory[WORDS];

#ifdef TWO_KINDS
#define IS_SEQUENCE(page) ((page) == 1)
#else
#define IS_SEQUENCE(page) false
#endif
#define BUSY(page, generation) (IS_SEQUENCE(page) -> 0 : 2 * (generation) - 1)
#if defined(SAME_SEQUENCE)
#define RELEASED(page, generation) (IS_SEQUENCE(page) -> 2 : 2 * (generation))
#elif defined(READ_BACK)
#define RELEASED(page, generation) (IS_SEQUENCE(page) -> memory[VERSION(page)] + 2 : 2 * (generation))
#else
#define RELEASED(page, generation) (2 * (generation) + (IS_SEQUENCE(page) -> 2 : 0))
#endif
#define IS_BUSY(page, version) (IS_SEQUENCE(page) -> (version) == 0 : (version) % 2 == 1)

/* Whose line a reading is: its version says so, but for a sequence that comes again. */
#if defined(SAME_SEQUENCE) || defined(READ_BACK)
#define GENERATION(page, version, anchor) (IS_SEQUENCE(page) -> (anchor) : (version) / 2)
#else
#define GENERATION(page, version, anchor) ((version) / 2 - (IS_SEQUENCE(page) -> 1 : 0))
#endif

/* The pages that are marked before A, and those that are released after B. */
#ifdef COUNTER_LATE
#define FIRST_PAGE 1
#else
#define FIRST_PAGE 0
#endif
#if defined(BUSY_AFTER_A) || defined(NO_ZERO)
#define LAST_MARKED 0
#else
#define LAST_MARKED (PAGES - 1)
#endif
#ifdef RELEASED_BEFORE_B
#define LAST_RELEASED 0
#else
#define LAST_RELEASED (PAGES - 1)
#endif

/* x86: other CPUs see a CPU's stores in their order, but at any time later. */
#define STORES (4 * PAGES + 1) /* of a whole publish, so that no store waits for room */
chan store_buffers[PUBLISHES] = [STORES] of { byte, byte };

proctype drain(chan store_buffer)
{
	byte address, value;

	do
	:: d_step { store_buffer ? address, value -> memory[address] = value; address = 0; value = 0 }
	od
}

/* ---- The lines, for readers to compute from and to be judged by. ---- */

typedef line {
	byte break_tsc;
	byte break_ns;
	byte mul /* ns a tick; 0 is "none yet" */
};

#define LINES (PUBLISHES + 2) /* the first, those published, and one that never comes: each has a next */
line lines[PAGES * LINES];

#define LINE(page, generation) lines[(page) * LINES + (generation)]
#define START_NS 10 /* the clock at TSC 0: so old that no line shows less than 0 */
#define NS_AT(page, anchor, scale, tsc) \
	(LINE(page, anchor).break_ns + ((tsc) - LINE(page, anchor).break_tsc) * LINE(page, scale).mul)

/* ---- The writers.  Each publish is made on another CPU: the next one sees only what has left the buffer. ---- */

#define STORE(address, value) store_buffer ! address, value

#ifdef NO_DRAIN
#define MFENCE true
#else
#define MFENCE empty(store_buffer)
#endif

#ifdef NO_WAIT
#define WAIT_FOR(tsc) true
#else
#define WAIT_FOR(tsc) now >= (tsc)
#endif

/* Three steps.  Any time may pass before each, also when what it waits for has come.  The stores of a step go into the
 * buffer together: nobody sees when they do, only when they leave it.
 */
inline publish(first, last)
{
#ifndef NO_ODD
	atomic {
		for (page : first .. (last < LAST_MARKED -> last : LAST_MARKED)) {
			STORE(VERSION(page), BUSY(page, generation))
		}
	}
#endif
	atomic {
		MFENCE -> /* and rdtsc */
		for (page : first .. last) {
			LINE(page, generation).break_tsc = now + MARGIN;
			LINE(page, generation).break_ns = NS_AT(page, generation - 1, generation - 1, now + MARGIN);
			LINE(page, generation).mul = mul
		}
#ifdef COUNTER_LATE
		LINE(0, generation).break_tsc = now + MARGIN;
		LINE(0, generation).break_ns = LINE(1, generation).break_ns;
		LINE(0, generation).mul = mul;
#endif
#ifdef BUSY_AFTER_A
		STORE(VERSION(1), BUSY(1, generation));
#endif
		for (page : first .. last) {
			STORE(ANCHOR(page), generation);
			STORE(SCALE(page), generation)
		}
#ifdef RELEASED_BEFORE_B
		STORE(VERSION(1), RELEASED(1, generation));
#endif
		printf("TSC %d: line %d, pages %d to %d, from TSC %d on, %d ns a tick\n",
		       now, generation, first, last, now + MARGIN, mul)
	}
	atomic {
		WAIT_FOR(LINE(first, generation).break_tsc) ->
		for (page : first .. (last < LAST_RELEASED -> last : LAST_RELEASED)) {
			STORE(VERSION(page), RELEASED(page, generation))
		}
#ifdef COUNTER_LATE
		STORE(VERSION(0), BUSY(0, generation));
		STORE(ANCHOR(0), generation);
		STORE(SCALE(0), generation);
		STORE(VERSION(0), RELEASED(0, generation))
#endif
	}
}

proctype writer(chan store_buffer; byte generation)
{
	byte page, mul;

	atomic {
		memory[LOCK] == generation - 1 ->
		if
		:: mul = 1 /* slower than the first line */
		:: mul = 3 /* faster */
		fi
	}
#ifdef PAGE_BY_PAGE
	publish(0, 0);
	publish(1, 1);
#else
	publish(FIRST_PAGE, PAGES - 1);
#endif
	STORE(LOCK, generation)
}

/* ---- The readers: pvclock_read(), each of its own page. ---- */

byte reads_in_flight;
byte returned_ns = START_NS; /* the greatest that any finished read returned; one did before the first tick */

inline forget()
{
	version = 0; tsc = NEVER; anchor = 0; scale = 0; loads = 0; floor_ns = 0; ns = 0;
	reads_in_flight--
}

/* Loads keep their order, and the lfence keeps rdtsc behind the first; the others do not wait for rdtsc. */
proctype reader(byte page)
{
	byte version, anchor, scale, loads, floor_ns;
	byte tsc = NEVER; /* not read yet */
	short ns;
	bool torn, late_old, early_new, backward, last_line;

	do
	:: d_step {
		loads == 0 && !IS_BUSY(page, memory[VERSION(page)]) && reads_in_flight < READS_AT_ONCE ->
		version = memory[VERSION(page)];
		floor_ns = returned_ns;
		reads_in_flight++;
		loads = 1
	   }
	:: d_step { loads > 0 && tsc == NEVER -> tsc = now; rdtsc_by[page] = NEVER }
	:: d_step { loads == 1 -> anchor = memory[ANCHOR(page)]; loads = 2 }
	:: d_step { loads == 2 -> scale = memory[SCALE(page)]; loads = 3 }
	:: d_step { loads == 3 && memory[VERSION(page)] != version -> forget() } /* and try again */
	:: d_step {
		loads == 3 && memory[VERSION(page)] == version ->
		rdtsc_by[page] = (tsc == NEVER -> now + EARLY : NEVER);
		loads = 4
	   }
	:: d_step {
		loads == 4 && tsc != NEVER ->
		version = GENERATION(page, version, anchor);
		ns = NS_AT(page, anchor, scale, tsc);
		printf("TSC %d: page %d shows line %d at TSC %d: %d ns\n", now, page, version, tsc, ns);

		torn = anchor != version || scale != version;
		late_old = LINE(page, version + 1).mul && tsc > LINE(page, version + 1).break_tsc;
		early_new = tsc < LINE(page, version).break_tsc;
		backward = ns < floor_ns;
		assert(!torn);
		assert(!late_old);
		assert(!early_new);
		assert(!backward);
#ifdef WITNESS
		last_line = version == PUBLISHES;
		assert(!last_line);
#endif

		returned_ns = (ns > returned_ns -> ns : returned_ns);
		forget()
	   }
	od
}

init {
	byte i;

	atomic {
#ifdef TWO_KINDS
		memory[VERSION(1)] = RELEASED(1, 0);
#endif
		for (i : 0 .. PAGES - 1) {
			LINE(i, 0).break_ns = START_NS;
			LINE(i, 0).mul = 2;
			run reader(i)
		}
		for (i : 0 .. PUBLISHES - 1) {
			run writer(store_buffers[i], i + 1);
			run drain(store_buffers[i])
		}
		run counter()
	}
}
