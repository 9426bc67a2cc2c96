"""Commands around a run: doctor, sweep, report, inspect, app, verify."""
