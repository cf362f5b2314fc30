//! Weights in the form that slime's delta synchronisation reads, and the checksums that it knows.
