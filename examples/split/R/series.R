# Every file below R/ is read before the app starts: the place for functions that both halves, or tests, use.
select_period <- function(series, period) {
  half <- floor(length(series) / 2)
  switch(as.character(period),
         "1" = series[seq_len(half)],
         "2" = series[seq(half + 1, length(series))],
         as.numeric(series))
}
