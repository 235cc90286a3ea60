"""Room for calibration: traces → ranges → Q/DQ and state formats. Nothing is built here yet."""
