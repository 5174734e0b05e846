"""The command. The line: data, zoo, latency, report, log, job, then prune, rank and export, options, main."""
