"""The oracle: what the loss would be without a unit, measured. The line: program, exact, difference, journal, measure."""
