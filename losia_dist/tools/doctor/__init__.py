"""`losia-dist doctor`: whether a machine, or a cluster, is fit to train on, before anything is paid for or waited for."""
