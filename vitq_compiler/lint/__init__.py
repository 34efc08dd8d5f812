"""The linter: what a target demands of a graph, as a table of rules, and every place where a graph breaks one."""
