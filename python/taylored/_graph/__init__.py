"""Which channels live and die together: the graph as a value, and what finds it out.

The line: values, labels, shapes, moves, rules, mode, tracer, components, rehearsal, bundles, tracing.
"""
