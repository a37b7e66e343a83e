"""Tools around the method: what a run costs, whether a machine is fit for it, and the page about one."""
