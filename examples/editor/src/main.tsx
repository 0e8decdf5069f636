import { StrictMode } from 'react'
import { createRoot } from 'react-dom/client'

import { App } from './App.tsx'
import { readConfig } from './config.ts'
import { open, useProjectEditorStore } from './store.ts'
import './style.css'

createRoot(document.getElementById('root')!).render(
  <StrictMode>
    <App />
  </StrictMode>,
)

readConfig()
  .then(open)
  .catch((error: Error) => useProjectEditorStore.setState({ failed: error.message }))
