# The page of an app in two files; www/style.css is served beside it.
fluidPage(
  tags$head(tags$link(rel = "stylesheet", href = "style.css")),
  titlePanel("Sunspots"),
  selectInput("period", "Period", periods),
  textOutput("summary"),
  plotOutput("plot")
)
