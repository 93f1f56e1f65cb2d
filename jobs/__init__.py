"""Jobs that run by themselves: specs (`*.yaml`), submission through Ray, schedules, and files for other schedulers."""
