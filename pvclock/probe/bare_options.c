/* SPDX-License-Identifier: Apache-2.0 OR MIT */
#include "bare_options.h"

#include <stdbool.h>
#include <stddef.h>

enum { NUMBER_MOST = 1000000000 };

static bool ends_word(char character)
{
    return character == '\0' || character == ' ' || character == '\t' || character == '\n';
}

/* What follows `key` in `word`, or NULL. */
static const char *value_of(const char *word, const char *key)
{
    while (*key)
        if (*word++ != *key++)
            return NULL;
    return word;
}

/* The digits at `*text`, which goes on behind them; false if there are none or the number is too large. */
static bool take_number(const char **text, int64_t *number)
{
    const char *at = *text;

    *number = 0;
    while (*at >= '0' && *at <= '9') {
        *number = *number * 10 + (*at++ - '0');
        if (*number > NUMBER_MOST)
            return false;
    }
    if (at == *text)
        return false;
    *text = at;
    return true;
}

static void take_seconds(const char *text, struct bare_options *options)
{
    int64_t seconds, milliseconds = 0;

    if (!take_number(&text, &seconds))
        return;
    milliseconds = seconds * 1000;
    if (*text == '.')
        for (int unit = 100; text++, *text >= '0' && *text <= '9'; unit /= 10)
            milliseconds += (*text - '0') * unit;
    if (ends_word(*text) && milliseconds >= MILLISECONDS_LEAST && milliseconds <= MILLISECONDS_MOST)
        options->milliseconds = (uint64_t)milliseconds;
}

static void take_cpus(const char *text, struct bare_options *options)
{
    int64_t cpus;

    if (take_number(&text, &cpus) && ends_word(*text) && cpus >= 1 && cpus <= PROBE_CPUS_MAX)
        options->cpus = (unsigned)cpus;
}

static void take_added(const char *text, struct bare_options *options)
{
    int64_t cpu, ns;
    bool negative;

    if (!take_number(&text, &cpu) || cpu >= PROBE_CPUS_MAX || *text++ != ':')
        return;
    negative = *text == '-';
    if (negative)
        text++;
    if (take_number(&text, &ns) && ends_word(*text))
        options->added_ns[cpu] = negative ? -ns : ns;
}

static void take_word(const char *word, struct bare_options *options)
{
    const char *text;

    if ((text = value_of(word, "seconds=")))
        take_seconds(text, options);
    else if ((text = value_of(word, "cpus=")))
        take_cpus(text, options);
    else if ((text = value_of(word, "add=")))
        take_added(text, options);
}

void parse_options(const char *command_line, struct bare_options *options)
{
    options->milliseconds = MILLISECONDS_DEFAULT;
    options->cpus = PROBE_CPUS_MAX;
    for (unsigned cpu = 0; cpu < PROBE_CPUS_MAX; cpu++)
        options->added_ns[cpu] = 0;
    for (const char *at = command_line; *at; at++)
        if (at == command_line || ends_word(at[-1]))
            take_word(at, options);
}
