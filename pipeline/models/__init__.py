import logging

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # before it is imported, when it names what it could use and has not
