import { MergeView } from '@codemirror/merge'
import { EditorState } from '@codemirror/state'
import { EditorView } from 'codemirror'
import { useEffect, useRef, useState } from 'react'

import type { Version } from './project.ts'
import { contentOf, restore } from './store.ts'
import { look } from './theme.ts'

const read = [look, EditorState.readOnly.of(true), EditorView.lineWrapping]

/** The versions of one file, each beside the newest. */
export default function History({ path, versions }: { path: string; versions: Version[] }) {
  const [chosen, setChosen] = useState(1)
  const place = useRef<HTMLDivElement>(null)
  const [newest] = versions
  const old = versions[Math.min(chosen, versions.length - 1)]

  const [failed, setFailed] = useState('')

  useEffect(() => {
    if (!old || !newest) return
    let over = false
    let view: MergeView | undefined
    Promise.all([old, newest].map((each) => contentOf(path, each.version))).then(
      ([before, now]) => {
        if (over) return
        setFailed('')
        view = new MergeView({
          a: { doc: before, extensions: read },
          b: { doc: now, extensions: read },
          collapseUnchanged: { margin: 3 },
          parent: place.current!,
        })
      },
      (error: Error) => {
        if (!over) setFailed(error.message)
      },
    )
    return () => {
      over = true
      view?.destroy()
    }
  }, [path, old, newest])

  if (!newest || !old) return <p className="alone">{path} has no history.</p>
  return (
    <div className="history">
      <div className="bar">
        <label>
          Compare version{' '}
          <select value={chosen} onChange={(event) => setChosen(Number(event.target.value))}>
            {versions.map((each, index) => (
              <option key={each.version} value={index}>
                {each.version}: {new Date(each.created_at).toLocaleString()}{each.is_deleted ? ', deleted' : ''}
              </option>
            ))}
          </select>{' '}
          with {newest.version}, the newest
        </label>
        <button disabled={old.is_deleted || old === newest} onClick={() => restore(path, old.version)}>Restore it</button>
      </div>
      {failed && <p className="alone">The version could not be read: {failed}</p>}
      <div className="code" ref={place} />
    </div>
  )
}
