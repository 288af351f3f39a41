/* SPDX-License-Identifier: Apache-2.0 OR MIT */
#include "bare_options.h"

#include <stdbool.h>
#include <stddef.h>

static const int64_t ADDED_NS_MAX = 1000000000000;

static bool is_space(char character)
{
    return character == ' ' || character == '\t' || character == '\n';
}

/* What follows `key` in `word`, or NULL. */
static const char *value_of(const char *word, const char *key)
{
    while (*key)
        if (*word++ != *key++)
            return NULL;
    return word;
}

/* The digits at `*text`, which goes on behind them; false if there are none, or the number is beyond `largest`. */
static bool take_number(const char **text, int64_t largest, int64_t *number)
{
    const char *at = *text;

    *number = 0;
    while (*at >= '0' && *at <= '9') {
        *number = *number * 10 + (*at++ - '0');
        if (*number > largest)
            return false;
    }
    if (at == *text)
        return false;
    *text = at;
    return true;
}

static bool take_seconds(const char *text, struct bare_options *options)
{
    int64_t seconds, milliseconds;

    if (!take_number(&text, MILLISECONDS_MOST / 1000, &seconds))
        return false;
    milliseconds = seconds * 1000;
    if (*text == '.')
        for (int unit = 100; text++, *text >= '0' && *text <= '9'; unit /= 10)
            milliseconds += (*text - '0') * unit;
    if (*text || milliseconds < MILLISECONDS_LEAST || milliseconds > MILLISECONDS_MOST)
        return false;
    options->milliseconds = (uint64_t)milliseconds;
    return true;
}

static bool take_cpus(const char *text, struct bare_options *options)
{
    int64_t cpus;

    if (!take_number(&text, PROBE_CPUS_MAX, &cpus) || *text || cpus < 1)
        return false;
    options->cpus = (unsigned)cpus;
    return true;
}

static bool take_added(const char *word, const char *text, struct bare_options *options)
{
    int64_t cpu, ns;
    bool is_negative;

    if (!take_number(&text, PROBE_CPUS_MAX - 1, &cpu) || *text++ != ':')
        return false;
    is_negative = *text == '-';
    text += *text == '-' || *text == '+';
    if (!take_number(&text, ADDED_NS_MAX, &ns) || *text)
        return false;
    options->added_ns[cpu] = is_negative ? -ns : ns;
    options->added_by[cpu] = word;
    return true;
}

/* Whether the word was one of ours, and made sense. */
static bool take_word(const char *word, struct bare_options *options)
{
    const char *text;

    if ((text = value_of(word, "seconds=")))
        return take_seconds(text, options);
    if ((text = value_of(word, "cpus=")))
        return take_cpus(text, options);
    if ((text = value_of(word, "add=")))
        return take_added(word, text, options);
    return false;
}

static void ignore(const char *word, struct bare_options *options)
{
    if (options->ignored_count < IGNORED_MAX)
        options->ignored[options->ignored_count++] = word;
}

/* End the word at `at`; where the next one may begin. */
static char *cut_word(char *at)
{
    while (*at && !is_space(*at))
        at++;
    if (*at)
        *at++ = '\0';
    return at;
}

void parse_options(char *command_line, struct bare_options *options)
{
    char *at = command_line;

    *options = (struct bare_options){ .milliseconds = MILLISECONDS_DEFAULT, .cpus = PROBE_CPUS_MAX };
    while (*at) {
        char *word = at;

        at = cut_word(at);
        if (*word && !take_word(word, options))
            ignore(word, options);
    }
}

void ignore_faults_beyond(struct bare_options *options, unsigned cpus)
{
    for (unsigned cpu = cpus; cpu < PROBE_CPUS_MAX; cpu++)
        if (options->added_by[cpu])
            ignore(options->added_by[cpu], options);
}
