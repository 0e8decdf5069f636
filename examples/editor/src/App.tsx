import { Component, lazy, type ReactNode, Suspense, useEffect, useState } from 'react'

import { Code } from './Code.tsx'
import { Preview } from './Preview.tsx'
import { save, showHistory, useProjectEditorStore as useStore } from './store.ts'
import { Tabs } from './Tabs.tsx'
import { Timeline } from './Timeline.tsx'
import { Tree } from './Tree.tsx'

// What compares two texts is a third of the page, and needed later or never.
const History = lazy(() => import('./History.tsx'))
const ConflictDialog = lazy(() => import('./ConflictDialog.tsx'))

/** A part that fails takes itself off the page; what was typed is kept, and the page is told. */
class Contained extends Component<{ children: ReactNode }, { error: Error | null }> {
  state = { error: null as Error | null }
  static getDerivedStateFromError(error: Error) {
    return { error }
  }
  render() {
    const { error } = this.state
    return error ? <p className="alone" role="alert">This part of the page failed ({error.message}). Nothing typed is lost: load the page again.</p> : this.props.children
  }
}

export function App() {
  const { config, failed, active, history, conflict } = useStore()

  useEffect(() => {
    const onKey = (event: KeyboardEvent) => {
      if ((event.ctrlKey || event.metaKey) && event.key === 's') {
        event.preventDefault()
        const { active: path } = useStore.getState()
        if (path) void save(path)
      }
    }
    addEventListener('keydown', onKey)
    return () => removeEventListener('keydown', onKey)
  }, [])

  if (failed) return <main className="alone" role="alert">{failed}</main>
  if (!config) return <main className="alone" aria-busy="true">opening the project …</main>
  return (
    <div className="page">
      <header>
        <h1>{config.project_name}</h1>
        <Connection />
        <Notice />
      </header>
      <nav aria-label="Files"><Tree /></nav>
      <main>
        <Tabs />
        {active ? history ? <Contained><Suspense><History {...history} /></Suspense></Contained> : <Code path={active} /> : <p className="alone">Open a file from the tree.</p>}
        {active && (
          <div className="bar">
            <button onClick={() => save(active)}>Save <kbd>Ctrl S</kbd></button>
            <button aria-pressed={history !== null} onClick={() => (history ? useStore.setState({ history: null }) : showHistory(active))}>History</button>
          </div>
        )}
      </main>
      <section className="right" aria-label="Preview">
        <Preview url={config.preview_url} />
        <Timeline />
      </section>
      {conflict && <Contained><Suspense><ConflictDialog conflict={conflict} /></Suspense></Contained>}
    </div>
  )
}

function Connection() {
  const connected = useStore((state) => state.connected)
  const [waited, setWaited] = useState(false)
  useEffect(() => {
    const timer = setTimeout(() => setWaited(true), 3000)
    return () => clearTimeout(timer)
  }, [])
  if (connected || !waited) return <span className="state ok">{connected ? 'connected' : 'connecting …'}</span>
  return <span className="state bad" role="status">not connected: you can read and type, and saving is tried when you save</span>
}

function Notice() {
  const notice = useStore((state) => state.notice)
  return (
    <p className={`notice ${notice?.kind ?? ''}`} role={notice?.kind === 'error' ? 'alert' : 'status'}>
      {notice?.text}
      {notice && <button aria-label="Dismiss" onClick={() => useStore.setState({ notice: null })}>×</button>}
    </p>
  )
}
