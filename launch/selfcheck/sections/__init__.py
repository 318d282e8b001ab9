"""What is checked: a module for each section, whose `run(report)` adds checks to a
`launch.selfcheck.report.Report`."""
