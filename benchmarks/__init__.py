"""The report: measures what is claimed about the kernels' cost, on the reader's own machine."""
