"""One module an export format: `write(source, directory, check)` makes the form in an empty directory.

`source` is an `artifacts.export_source.ExportSource`; `check` is called now and then and may raise to stop.
"""
