"""Jobs: what people submit, schedule and run, one file each."""
