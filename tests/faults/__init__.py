"""Faults of the system and damaged inputs, in small doses among the tests and for long with `make soak`.

inject          the n-th call of a process on files of a folder fails, or a signal arrives there
processes       commands in forks of a process that has everything imported
scenarios       commands with their inputs, and what a finished result looks like
registry        campaigns, each an endless stream of trials
campaigns/      one file per campaign
soak            runs all campaigns for a while and counts
"""
