"""The command line: ``qtale VERB``, one file per verb."""
