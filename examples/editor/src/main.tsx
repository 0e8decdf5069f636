import { StrictMode } from 'react'
import { createRoot } from 'react-dom/client'

import { App } from './App.tsx'
import { readConfig } from './config.ts'
import { again, kept } from './offline.ts'
import { open, openKept, useProjectEditorStore } from './store.ts'
import './style.css'

createRoot(document.getElementById('root')!).render(
  <StrictMode>
    <App />
  </StrictMode>,
)

readConfig()
  .then(open)
  .catch(async (error: Error) => {
    const shown = await kept()
    if (!shown) return useProjectEditorStore.setState({ failed: error.message })
    await openKept(shown)
    await again()
    location.reload() // what was typed is among the drafts
  })

if ('serviceWorker' in navigator && import.meta.env.PROD) void navigator.serviceWorker.register('worker.js')
