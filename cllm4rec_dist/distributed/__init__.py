"""Process groups: rendezvous, collectives, the ZeRO-3 engine, and the watchdog that finds the rank at fault."""
