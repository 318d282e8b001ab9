"""The sections: one module each, whose `run(report)` adds checks to a `selfcheck.report.Report`."""
